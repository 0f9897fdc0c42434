r"""How good one pipeline's images are: FID with Inception's weights, or the same metrics on any classifier.

    accelerate launch examples/evaluate.py --model runs/digits/students/1-step \
        --feature_extractor runs/digits/evaluator
    accelerate launch examples/evaluate.py --model me/student --dataset uoft-cs/cifar10 --inception_weights PATH \
        --metrics fd is kid precision recall --output evaluation.json

The same as `rcfd evaluate`.
"""

from diffusers_rcfd.cli.evaluate import main

if __name__ == "__main__":
    main()
