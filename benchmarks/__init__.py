"""What funcgrad costs and gains beside JAX: ratios, interleaved in one process.

python -m benchmarks [gradients dispatch training rewriting ...] [--json out.json] [--quick]
python -m benchmarks --check

A part is a module with a page of its own:

    run(quick) -> rows      what was measured, a dict each; names carry units (`_us`, `_bytes`), ratios carry none
    figures(rows)           what of it has a target
    COLUMNS                 which of a row the table shows, and how

`interleaving` says how things are timed; `__main__` picks parts, prints, and writes JSON. `bounds` is the table of all bounds
that `check` holds; it ends with status 1 if one is missed.
"""

import jax

jax.config.update("jax_num_cpu_devices", 4)  # the corpus of the tests maps over four
