"""The typed settings, how a value is held against a type, and every error of ours."""
