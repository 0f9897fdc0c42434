"""Where the real images come from: the options of `load_image_data`. Free of torch."""

from dataclasses import dataclass

from diffusers_rcfd.validation import is_count, option, require, require_kinds


@dataclass
class DataConfig:
    """Where the real images come from; the arguments of `load_image_data`."""

    dataset: str = option(
        "digits",
        "'digits' (embedded), a data set's name on the Hub, a local folder of images, parquet or arrow files, or "
        "'fashion-mnist' with its IDX files in `data_dir`.",
    )
    dataset_config_name: str | None = option(None, "Configuration of a data set that has several.")
    data_dir: str | None = option(None, "Folder of the data set's files.")
    split: str = option("train", "Split to train on.")
    image_column: str | None = option(None, "Column of the images; found when there is one.")
    label_column: str | None = option(None, "Column of the class labels; found when there is one.")
    resolution: int | None = option(None, "Resize the shorter side to this, crop the centre; as they are if unset.")
    channels: int | None = option(None, "1 for grey, 3 for RGB; those of the images if unset.")
    streaming: bool = option(False, "Read a Hub data set while training, without downloading it first.")
    cache_dir: str | None = option(None, "Cache folder of the data set.")

    def __post_init__(self):
        require_kinds(self)
        grey_or_rgb = is_count(self.channels) and self.channels in (1, 3)
        require(self.channels is None or grey_or_rgb, "channels", self.channels, "1 or 3")
        require(
            self.resolution is None or is_count(self.resolution, 1),
            "resolution",
            self.resolution,
            "a positive integer",
        )
