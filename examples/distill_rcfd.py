"""From real images to a 1-step generator: base model, classifier, ladder of students, and a comparison.

    accelerate launch examples/distill_rcfd.py

runs the recipe `digits` on the CPU in minutes. A recipe sets any option, and the command line wins:

    accelerate launch examples/distill_rcfd.py --config cifar10_resnet18 --teacher me/ddpm --output_dir runs/cifar10

The job is `diffusers_rcfd/cli/distill.py`, which is also `rcfd distill` and `python -m diffusers_rcfd distill`. To
distil with a loss or a source of pairs of your own, register it here before `main()`.
"""

from diffusers_rcfd.cli.distill import main, read_options

__all__ = ["main", "read_options"]

if __name__ == "__main__":
    main()
