"""A runtime: the blocks of a quantized transformer as graphs that OpenVINO compiles for a CPU."""
