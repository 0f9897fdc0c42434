"""A base model distilled along the student's own trajectory, in a fraction of a ladder's time, and a comparison.

    accelerate launch examples/distill_sfd.py --teacher runs/digits/base --evaluator runs/digits/evaluator

runs the recipe `digits_sfd`; without these two they are trained first, by the recipe. Other recipes and options:

    accelerate launch examples/distill_sfd.py --config digits_sfdv --objective cfd --classifier runs/digits/classifier

The job is `diffusers_rcfd/cli/sfd.py`, which is also `rcfd sfd`.
"""

from diffusers_rcfd.cli.sfd import main, read_options

__all__ = ["main", "read_options"]

if __name__ == "__main__":
    main()
