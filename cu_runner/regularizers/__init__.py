"""Add-on regularizers: one file and one YAML of conf/reg each; they combine in list order."""
