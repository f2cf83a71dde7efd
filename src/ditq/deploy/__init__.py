"""Turns a quantized transformer into one that another runtime executes, inside the same diffusers class."""
