"""ResNet-50 on ImageNet.

Paper:     He et al. 2016 (arXiv 1512.03385); the schedule of Goyal et al. 2017 (arXiv 1706.02677).
Expected:  not measured by this project yet; torchvision's first weights of this architecture have 76.13 % top-1.
Hardware:  2.8e18 floating-point operations (3 passes of 8.2 GFLOP an image, 1.28 M images, 90 epochs): about 8 hours on one
           accelerator of 100 TFLOP/s effective bfloat16.
Command:   python -m robust_vit.main --config=configs/resnet50.py --workdir=runs/resnet50 --config.data.data_dir=/data/tfds
           After the colon: cifar10, fashion_mnist, textured_shapes or folder=PATH choose the data; smoke shrinks everything.
"""

from robust_vit import presets, settings


def get_config(argument: str = ""):
    """The configuration; `argument` is comma-separated, for example "cifar10,smoke"."""
    config = settings.default()
    with config.unlocked():
        config.model = settings.model("resnet", depth=50, zero_init_residual=True, dtype="bfloat16")
        config.studies = {
            "accuracy": settings.study("accuracy"),
            "calibration": settings.study("calibration"),
            "attack_curve": settings.study("attack_curve", examples=1000, steps=20),
            "hessian_spectrum": settings.study("hessian_spectrum", early=True),
        }
    smoke = presets.apply_argument(config, argument, data="imagenet", image_size=224)
    config.objective.label_smoothing = 0.1
    config.optimizer.name = "sgd"
    config.optimizer.learning_rate = 0.1
    config.optimizer.reference_batch = 256
    config.optimizer.nesterov = True
    config.optimizer.schedule = "step"
    config.optimizer.boundaries = (1 / 3, 2 / 3, 8 / 9)
    config.optimizer.warmup_epochs = 5.0
    config.optimizer.weight_decay = 1e-4
    config.train.epochs = 90.0
    config.threat = "imagenet/linf-4"
    if smoke:
        with config.unlocked():
            config.model.update({"depth": 18, "width": 8, "dtype": "float32"})
            config.data.image_size = 32
        presets.shrink(config)
    return config
