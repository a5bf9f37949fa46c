"""The parts of the AOTInductor backend."""
