"""Changes of a graph before OpenVINO compiles it."""
