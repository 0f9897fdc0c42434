r"""Convert a checkpoint of the authors' code (base model, PD or RCFD student, classifier) to this package's format.

    python examples/convert_checkpoint.py --checkpoint logs/CIFAR10/4/ckpt.pt --output runs/authors/4-step
    python examples/convert_checkpoint.py --kind classifier --checkpoint classifier/result/cifar10/resnet18/ckpt.pt \
        --output runs/authors/resnet18

The same as `rcfd convert`.
"""

from diffusers_rcfd.cli.convert import main

if __name__ == "__main__":
    main()
