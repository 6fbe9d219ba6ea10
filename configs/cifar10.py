"""A small ViT and a small ResNet on CIFAR-10, 32 px, and every study on both: as far as two CPU cores go in minutes.

Paper:     Krizhevsky 2009; Dosovitskiy et al. 2021 (arXiv 2010.11929); He et al. 2016 (arXiv 1512.03385).
Expected:  see "Real images" in the README. With 100 epochs and more on an accelerator expect far better.
Hardware:  2 CPU cores, about 10 minutes for each model.
Command:   python -m robust_vit.main --config=configs/cifar10.py --workdir=runs/cifar10
           --config.data.name=cifar10_q75 --config.data.data_dir=FOLDER trains on another copy of the data.
           configs/cifar10.py:smoke shrinks everything to seconds, on the embedded data set.
"""

from robust_vit import presets, settings


def get_config(argument: str = ""):
    """The configuration; `argument` is empty or "smoke"."""
    config = settings.default()
    smoke = presets.apply_argument(config, argument, data="cifar10")
    with config.unlocked():
        config.model = settings.model("vit", width=64, depth=4, heads=4, mlp_width=256, patch=4, head="gap")
        config.runs = {
            "vit": {"train": {"epochs": 8.0}, "optimizer": {"learning_rate": 2e-3}},
            "resnet": {
                "model": settings.model("resnet", depth=8),
                "optimizer": {"name": "sgd", "learning_rate": 0.1, "weight_decay": 5e-4},
                "train": {"epochs": 10.0},
            },
        }
        config.studies = {
            "accuracy": settings.study("accuracy"),
            "calibration": settings.study("calibration"),
            "attack_curve": settings.study("attack_curve", examples=1000, steps=20),
            "hessian_spectrum": settings.study("hessian_spectrum", early=True),
        }
    config.log_every = 100
    config.threat = "cifar10/linf-8"
    if smoke:
        presets.shrink(config)
    return config
