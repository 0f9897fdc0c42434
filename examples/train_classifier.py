"""Train the classifier whose features are distilled, and report its accuracy on held-out images.

    accelerate launch examples/train_classifier.py --config digits --output_dir runs/digits-classifier

The same as `rcfd train-classifier`.
"""

from diffusers_rcfd.cli.train_classifier import main, read_options

__all__ = ["main", "read_options"]

if __name__ == "__main__":
    main()
