"""Add-on regularizers: one file and one YAML each of the same name; they combine in list order."""
