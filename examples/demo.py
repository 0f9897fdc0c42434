"""A page in the browser that samples a model in 1, 2 or 4 steps, with the base model beside it on the same noise.

    pip install -e ".[demo]"
    python examples/demo.py --model runs/digits/students --base runs/digits/base

The same as `rcfd demo`, whose `--help` shows how to make a Space of the Hub from it.
"""

from diffusers_rcfd.cli.demo import main

if __name__ == "__main__":
    main()
