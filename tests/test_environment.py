"""What reports and caches say about a machine."""

import torch

from ditq.environment import LIBRARIES, cpu_name, environment, versions


def test_environment_names_everything_that_a_number_depends_on() -> None:
    found = environment()
    assert found["threads"] == torch.get_num_threads()
    assert found["versions"].keys() == {"ditq", *LIBRARIES}
    assert found["versions"]["torch"] == versions("torch")["torch"]
    assert found["cpu"] == f"{cpu_name()} ({torch.backends.cpu.get_cpu_capability()})"
    assert found["device"] == (torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name())
    assert cpu_name().strip()
