"""From YAML and a command line to checked plain values, by Hydra."""
