"""Train a base diffusion model on real images and save it as a pipeline.

    accelerate launch examples/train_teacher.py --config digits --output_dir runs/digits-base

The same as `rcfd train-teacher`.
"""

from diffusers_rcfd.cli.train_teacher import main, read_options

__all__ = ["main", "read_options"]

if __name__ == "__main__":
    main()
