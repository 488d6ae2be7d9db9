"""Add-on regularizers. One file here and one YAML of the same name in conf/reg make one; they combine in list order."""
