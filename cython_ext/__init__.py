"""The compiled core: C++17 headers with thin Cython faces."""
