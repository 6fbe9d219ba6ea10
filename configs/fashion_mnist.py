"""A small ViT and a small ResNet on Fashion-MNIST, one channel, 28 px, and every study on both.

Paper:     Xiao et al. 2017 (arXiv 1708.07747); Dosovitskiy et al. 2021 (arXiv 2010.11929); He et al. 2016 (arXiv 1512.03385).
Expected:  see "Real images" in the README; a linear model has 84 % test accuracy.
Hardware:  2 CPU cores, at most 15 minutes for each model.
Command:   python -m robust_vit.main --config=configs/fashion_mnist.py --workdir=runs/fashion_mnist
           --config.data.data_dir=FOLDER names the folder that holds fashion_mnist/3.0.1 in array_record format.
           configs/fashion_mnist.py:smoke shrinks everything to seconds, on the embedded data set.
"""

from robust_vit import presets, settings


def get_config(argument: str = ""):
    """The configuration; `argument` is empty or "smoke"."""
    config = settings.default()
    smoke = presets.apply_argument(config, argument, data="fashion_mnist")
    with config.unlocked():
        config.model = settings.model("vit", width=64, depth=6, heads=4, mlp_width=256, patch=7, head="gap")
        config.runs = {
            "vit": {"train": {"epochs": 16.0}, "optimizer": {"learning_rate": 2e-3}},
            "resnet": {
                "model": settings.model("resnet", depth=8, width=8),
                "optimizer": {"name": "sgd", "learning_rate": 0.1, "weight_decay": 5e-4},
                "train": {"epochs": 4.0},
            },
        }
        config.studies = {
            "accuracy": settings.study("accuracy"),
            "calibration": settings.study("calibration"),
            "attack_curve": settings.study("attack_curve", examples=1000, steps=20),
            "hessian_spectrum": settings.study("hessian_spectrum", early=True),
        }
    config.data.augment = ("flip()",)
    config.log_every = 200
    config.threat = "fashion_mnist/linf-0.1"
    if smoke:
        presets.shrink(config)
    return config
