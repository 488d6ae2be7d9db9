"""Add-on regularizers: one file and one YAML of the same name in conf/reg each; they combine in
list order.
"""
