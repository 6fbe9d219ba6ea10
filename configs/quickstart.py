"""A small ViT and a small ResNet on the embedded data set, trained, attacked, calibrated and curved. No data needed.

Paper:     Dosovitskiy et al. 2021 (arXiv 2010.11929); He et al. 2016 (arXiv 1512.03385).
Expected:  see "Quickstart" in the README.
Hardware:  2 CPU cores, under 4 minutes in all.
Command:   python -m robust_vit.main --config=configs/quickstart.py --workdir=runs/quickstart
           configs/quickstart.py:smoke runs the same way in less than a minute.
"""

from robust_vit import presets, settings


def get_config(argument: str = ""):
    """The configuration; `argument` is empty or "smoke"."""
    config = settings.default()
    smoke = presets.apply_argument(config, argument, data="textured_shapes")
    with config.unlocked():
        config.model = settings.model("vit", width=64, depth=4, heads=4, mlp_width=128, patch=8, head="gap")
        config.runs = {
            "vit": {},
            "resnet": {
                "model": settings.model("resnet", depth=8, width=8),
                "optimizer": {"name": "sgd", "learning_rate": 0.1, "weight_decay": 5e-4},
            },
        }
        config.studies = {
            "accuracy": settings.study("accuracy"),
            "calibration": settings.study("calibration"),
            "attack_curve": settings.study("attack_curve", examples=192, steps=10),
            "hessian_spectrum": settings.study("hessian_spectrum"),
        }
    # Without colour and without shifts: a ViT this small needs longer than a minute to see through those.
    config.data.update({"name": "textured_shapes/grey", "augment": (), "std": (0.13,), "batch": 64})
    config.train.epochs = 6.0
    config.threat = "textured_shapes/linf-8"
    if smoke:
        presets.shrink(config)
    return config
