"""Kernels in C++ for what torch leaves slow on a CPU: few rows through big weights."""
