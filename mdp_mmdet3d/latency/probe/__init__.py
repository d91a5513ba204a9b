"""What a probe bundle carries to the target: these files run with Python >= 3.8, numpy and the runtime alone.

They import `trt.builder` and `trt.cuda`, which lie in the bundle under the same names, nothing else of this package,
and each other only as top-level modules in `probe.py`, which is the bundle's program. The package's own backends use
the same timers, so tables made here and there are made in one way.
"""
