r"""What a sampler predicts on its way: x0 at each step, how sure a classifier is of it, and which classes it makes.

    python examples/inspect_student.py --models DDIM=runs/digits/base PD=runs/digits/students-pd/4-step \
        RCFD=runs/digits/students/4-step --num_inference_steps 4 --classifier runs/digits/evaluator \
        --output inspection.png

The same as `rcfd inspect`.
"""

from diffusers_rcfd.cli.inspect import main

if __name__ == "__main__":
    main()
