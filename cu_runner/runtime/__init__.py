"""The process and the machine: devices, other processes, signals, random numbers, provenance."""
