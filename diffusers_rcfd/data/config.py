"""Where the real images come from: the options of `load_image_data`. Free of torch."""

from dataclasses import dataclass

from diffusers_rcfd.validation import document_options, is_count, normalize, option, require

MAX_RESOLUTION = 8192  # one RGB image of this size has 200 MB


@document_options
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
        normalize(self)
        for name in ("dataset", "split"):
            require(getattr(self, name), name, getattr(self, name), "a name that is not empty")
        require(self.channels in (None, 1, 3), "channels", self.channels, "1 (grey) or 3 (RGB)")
        side = self.resolution
        possible = side is None or (is_count(side, 1) and side <= MAX_RESOLUTION)
        require(possible, "resolution", side, f"a positive integer of at most {MAX_RESOLUTION}")
