"""Sample images from a pipeline: a grid, and with --num_images a folder of PNG files or one .npz.

    python examples/sample.py --model runs/digits/students/1-step --output samples.png
    python examples/sample.py --model runs/digits/students/1-step --num_images 50000 --output samples.npz

The same as `rcfd sample`.
"""

from diffusers_rcfd.cli.sample import main

if __name__ == "__main__":
    main()
