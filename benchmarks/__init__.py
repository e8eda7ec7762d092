"""Costs and gains of funcgrad compared with JAX, as ratios of measurements that are interleaved in one process.

python -m benchmarks [gradients dispatch training rewriting ...] [--json out.json] [--quick]
python -m benchmarks --check

Each part is a module with these names:

    run(quick) -> rows      the measurements, one dict per row; names have a unit suffix (`_us`, `_bytes`), ratios have none
    figures(rows)           the numbers that have a target
    COLUMNS                 the columns of the printed table, with their formats

`interleaving` measures times. `__main__` selects the parts, prints the tables and writes JSON. `bounds` is the table of the
bounds that `check` holds: the command ends with status 1 if a figure misses its bound.
"""

import jax

jax.config.update("jax_num_cpu_devices", 4)  # the corpus of the tests maps over four
