"""cu-run as a module: accelerate launch --num_processes N -m cu_runner.cli ..."""

from cu_runner.cli.run import main

main()
