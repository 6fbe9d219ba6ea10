"""ViT-B/16 on ImageNet from scratch, by the recipe of DeiT.

Paper:     Dosovitskiy et al. 2021 (arXiv 2010.11929): the model. Touvron et al. 2021 (DeiT, arXiv 2012.12877), table 9: the
           recipe, without repeated augmentation.
Expected:  not measured by this project yet; DeiT-B reports 81.8 % top-1 (with repeated augmentation).
Hardware:  4.1e19 floating-point operations (3 passes of 35 GFLOP an image, 1.28 M images, 300 epochs): about 14 hours on 8
           accelerators of 100 TFLOP/s effective bfloat16.
Command:   python -m robust_vit.main --config=configs/vit_b16.py --workdir=runs/vit_b16 --config.data.data_dir=/data/tfds
           After the colon: cifar10, fashion_mnist, textured_shapes or folder=PATH choose the data; smoke shrinks everything.
"""

from robust_vit import presets, settings


def get_config(argument: str = ""):
    """The configuration; `argument` is comma-separated, for example "cifar10,smoke"."""
    config = settings.default()
    with config.unlocked():
        config.model = settings.model("vit", size="B", patch=16, stochastic_depth=0.1, dtype="bfloat16")
        config.studies = {
            "accuracy": settings.study("accuracy"),
            "calibration": settings.study("calibration"),
            "attack_curve": settings.study("attack_curve", examples=1000, steps=20),
            "hessian_spectrum": settings.study("hessian_spectrum", early=True),
        }
    # Small images are enlarged inside the classifier: at 32 px a patch of 16 would leave four tokens.
    smoke = presets.apply_argument(config, argument, data="imagenet", image_size=224)
    if config.data.augment[0].startswith("random_resized_crop"):
        config.data.augment = (
            "random_resized_crop(224, 0.08, 1.0, 'bicubic')",
            "flip()",
            "rand_augment(2, 9, 0.5, 'timm')",
            "random_erasing(0.25)",
        )
    config.objective.update({"label_smoothing": 0.1, "mixup": 0.8, "cutmix": 1.0})
    config.optimizer.learning_rate = 5e-4
    config.optimizer.reference_batch = 512
    config.optimizer.weight_decay = 0.05
    config.optimizer.warmup_epochs = 5.0
    config.train.epochs = 300.0
    config.threat = "imagenet/linf-4"
    if smoke:
        with config.unlocked():
            config.model.update({"size": "Ti", "dtype": "float32"})
            config.data.image_size = 32
        presets.shrink(config)
    return config
