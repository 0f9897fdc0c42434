"""A grid of distillation runs, one after another: the paper's ablations as one table and one figure.

    python examples/ablate.py losses
    python examples/ablate.py classifiers --variables data_dir=FOLDER_OF_THE_IDX_FILES

The same as `rcfd ablate`, whose `--help` shows how to write a grid.
"""

from diffusers_rcfd.cli.ablate import main

if __name__ == "__main__":
    main()
