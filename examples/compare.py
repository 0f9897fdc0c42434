r"""Students beside a base model under Diffusers' own samplers: same noise, same number of network calls, same judge.

    accelerate launch examples/compare.py --base runs/digits/base --students PD=runs/digits/students-pd/4-step \
        RCFD=runs/digits/students/4-step RCFD=runs/digits/students/1-step --samplers ddim dpm++2m unipc \
        --evaluations 8 4 2 1 --feature_extractor runs/digits/evaluator --num_images 5000

The same as `rcfd compare`.
"""

from diffusers_rcfd.cli.compare import main

if __name__ == "__main__":
    main()
