<<<<<<< HEAD
"""Unlearning methods: a file and a YAML of conf/method each; `_name` is shared and holds none."""
=======
"""Unlearning methods: one file and one YAML of the same name in conf/method each."""
>>>>>>> main
