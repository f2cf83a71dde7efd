"""The OpenVINO runtime: compiles the blocks of a quantized transformer as graphs for a CPU."""
