"""Packed codes against a bit stream in a Python integer."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ditq.numerics import pack, packed_bytes, unpack


def bit_stream(codes: list[int], bits: int) -> list[int]:
    """A row as bytes: the codes are the digits, base 2^bits, of one large little-endian number."""
    number = sum((code + 2 ** (bits - 1)) * 2 ** (bits * i) for i, code in enumerate(codes))
    return list(number.to_bytes(-(-len(codes) * bits // 8), "little"))


@st.composite
def coded(draw: st.DrawFn) -> tuple[int, list[list[int]]]:
    bits = draw(st.integers(2, 8))
    columns = draw(st.integers(1, 41))
    code = st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    row = st.lists(code, min_size=columns, max_size=columns)
    return bits, draw(st.lists(row, min_size=1, max_size=3))


@settings(deadline=None, max_examples=40)
@given(coded())
def test_pack_is_the_bit_stream_and_unpack_its_inverse(example: tuple[int, list[list[int]]]) -> None:
    bits, rows = example
    codes = torch.tensor(rows, dtype=torch.int8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == [bit_stream(row, bits) for row in rows]
    assert packed.shape[1] == packed_bytes(codes.shape[1], bits)
    back = unpack(packed, bits, codes.shape[1])
    assert back.dtype == torch.int8 and back.is_contiguous() and torch.equal(back, codes)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("columns", [1, 2, 3, 7, 8, 9, 31, 32, 33, 1152, 1155])
def test_round_trip_of_every_code(bits: int, columns: int) -> None:
    bottom, top = -(2 ** (bits - 1)), 2 ** (bits - 1)
    codes = (torch.arange(6 * columns) % (top - bottom) + bottom).to(torch.int8).reshape(6, columns)
    assert torch.equal(unpack(pack(codes, bits), bits, columns), codes)


def test_four_bits_low_nibble_first() -> None:
    assert pack(torch.tensor([[-8, 7, 0]], dtype=torch.int8), 4).tolist() == [[0xF0, 0x08]]


def test_two_bits_lowest_pair_first() -> None:
    assert pack(torch.tensor([[-2, -1, 0, 1, 1]], dtype=torch.int8), 2).tolist() == [[0b11100100, 0b00000011]]


@pytest.mark.parametrize(("columns", "bits", "size"), [(0, 4, 0), (1, 2, 1), (1152, 4, 576), (9, 3, 4), (5, 8, 5)])
def test_packed_bytes(columns: int, bits: int, size: int) -> None:
    assert packed_bytes(columns, bits) == size


@pytest.mark.parametrize("bits", range(2, 9))
def test_no_rows(bits: int) -> None:
    packed = pack(torch.empty(0, 5, dtype=torch.int8), bits)
    assert packed.shape == (0, packed_bytes(5, bits))
    assert unpack(packed, bits, 5).shape == (0, 5)


@pytest.mark.parametrize("bits", range(2, 9))
def test_slices_and_transposes(bits: int) -> None:
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (16, 12), dtype=torch.int8)
    assert torch.equal(pack(codes.T, bits), pack(codes.T.contiguous(), bits))
    packed = pack(codes, bits)
    assert torch.equal(unpack(packed[::3], bits, 12), codes[::3])
    wide = torch.cat((packed, packed), 1)[:, : packed.shape[1]]
    assert torch.equal(unpack(wide, bits, 12), codes)


@pytest.mark.parametrize("bits", range(2, 9))
def test_inputs_are_left_alone(bits: int) -> None:
    codes = torch.zeros(2, 8, dtype=torch.int8)
    packed = pack(codes, bits)
    before = packed.clone()
    unpack(packed, bits, 8).fill_(1)
    assert torch.equal(packed, before) and not codes.any()


@pytest.mark.parametrize(("bits", "code"), [(4, 8), (4, -9), (2, 2), (7, -65), (3, 127)])
def test_codes_out_of_range_are_refused(bits: int, code: int) -> None:
    with pytest.raises(ValueError, match=f"for {bits} bits, got .*{code}"):
        pack(torch.tensor([[0, code]], dtype=torch.int8), bits)


def test_wrong_width_and_types_are_refused() -> None:
    with pytest.raises(ValueError, match=r"uint8 \[R, 5\] for 9 columns of 4 bits, got torch.uint8 \(2, 4\)"):
        unpack(torch.zeros(2, 4, dtype=torch.uint8), 4, 9)
    with pytest.raises(ValueError, match="got torch.int8"):
        unpack(torch.zeros(2, 4, dtype=torch.int8), 4, 8)
    with pytest.raises(ValueError, match="int8 .*, got torch.int32"):
        pack(torch.zeros(2, 4, dtype=torch.int32), 4)
    with pytest.raises(ValueError, match="bits must be 2 to 8, got 1"):
        packed_bytes(8, 1)
