"""Readers and writers of the files PET people have.

``read_scan`` and ``write_scan`` go by the suffix; ``read_array`` gives the bare slices of .mat, .npy, .npz and .h5.
"""

from allpet.io.arrays import ARRAY_SUFFIXES, read_array
from allpet.io.formats import SUFFIXES, read_scan, write_scan
from allpet.io.scans import STATES, DataError, Scan, content_hash, lor_endpoints, odd_bins

__all__ = [
    "ARRAY_SUFFIXES",
    "STATES",
    "SUFFIXES",
    "DataError",
    "Scan",
    "content_hash",
    "lor_endpoints",
    "odd_bins",
    "read_array",
    "read_scan",
    "write_scan",
]
