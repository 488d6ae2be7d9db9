"""Many runs: submitted together, made side by side, and what became of each."""
