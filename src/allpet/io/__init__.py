"""Readers of the files PET people have: MATLAB, NumPy and HDF5 arrays."""

from allpet.io.arrays import ARRAY_SUFFIXES, DataError, read_array

__all__ = ["ARRAY_SUFFIXES", "DataError", "read_array"]
