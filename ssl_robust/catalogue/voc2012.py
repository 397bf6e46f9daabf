"""Pascal VOC 2012, segmentation."""

from pathlib import Path

from ..items import Archive, Dataset, Item
from .pictures import demand, text_of

VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip


def _voc(root: Path, task: str, split: str, n: int) -> list[Item]:
    home = root / "VOCdevkit" / "VOC2012"
    listed = home / "ImageSets" / "Segmentation" / {"train": "train.txt", "test": "val.txt"}[split]
    names = text_of(listed).split()
    items = [Item(i, home / "JPEGImages" / f"{i}.jpg", home / "SegmentationClass" / f"{i}.png") for i in names]
    demand((p for item in items for p in item[1:]), f"restore what {listed.name} names")
    return items


DATASETS = {
    "voc2012": Dataset(
        ("segmentation", "deacl"), "VOCdevkit/VOC2012/{JPEGImages,SegmentationClass,ImageSets/Segmentation}", _voc,
        {"segmentation": VOC_CLASSES}, counts={"train": (1_464,), "test": (1_449,)}, shape=(375, 500), gigabytes=2.1,
        archives=(Archive(
            "https://thor.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar", "VOCdevkit/VOC2012",
            1_999_639_040, "md5:6cd6e144f989b92b3379bac3b3de84fd",
        ),),
    ),
}  # fmt: skip
