"""The sources of pairs that a rung can be distilled by, by name.

A source is a generator (student, teacher, rung, batch) -> pairs, one for each optimizer step, see
`distillation.pairs.Pair`. Register one of your own with a row: `SOURCES["mine"] = my_pairs`.
"""

from diffusers_rcfd.distillation.ladder import ladder_pairs

SOURCES = {"ladder": ladder_pairs}
