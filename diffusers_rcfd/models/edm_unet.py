"""A `UNet2DModel` with the parts that EDM's networks (Karras et al. 2022) have beyond it."""

from diffusers import ModelMixin, UNet2DModel  # noqa: F401, by ModelMixin in here Diffusers finds how to load
from diffusers.configuration_utils import FrozenDict, register_to_config
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.resnet import ResnetBlock2D
from torch import nn


class EDMUNet2DModel(UNet2DModel):
    """`UNet2DModel` with the modules of EDM's DDPM++ or of a narrow ADM network; its forward pass is the same.

    No arguments of a plain `UNet2DModel` describe DDPM++: its blocks that resample have a learned 1x1 convolution on
    their shortcut, and there a plain one has the identity. A group norm forgets the scale of its input, so no other
    weights can make up for it.

    Args:
        stem_channels (`int`, *optional*): channels of the first convolution and of the embedding of the noise level;
            `None` is `block_out_channels[0]`.
        norm_group_size (`int`, defaults to 4): a group norm of C channels has min(`norm_num_groups`,
            C / `norm_group_size`) groups.
        resnet_out_scale_factor (`float`, defaults to 1.0): divides the output of every residual and attention block.
        resample_shortcut (`bool`, defaults to `False`): a 1x1 convolution on the shortcut of blocks that resample.
        attend_last_layer_up (`bool`, defaults to `False`): on the way up, only the last block of a level attends.
        embed_class_first (`bool`, defaults to `False`): the class is added before the two layers that embed the noise
            level, not after them. The second of these layers then belongs to each block.
        sample_size, in_channels, ...: as in `UNet2DModel`.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] | None = None,
        in_channels: int = 3,
        out_channels: int = 3,
        center_input_sample: bool = False,
        time_embedding_type: str = "positional",
        time_embedding_dim: int | None = None,
        freq_shift: int = 0,
        flip_sin_to_cos: bool = True,
        down_block_types: tuple[str, ...] = ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"),
        up_block_types: tuple[str, ...] = ("ResnetUpsampleBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        block_out_channels: tuple[int, ...] = (256, 256, 256),
        layers_per_block: int = 4,
        dropout: float = 0.0,
        attention_head_dim: int | None = None,
        norm_num_groups: int = 32,
        norm_eps: float = 1e-6,
        resnet_time_scale_shift: str = "default",
        class_embed_type: str | None = None,
        num_class_embeds: int | None = None,
        num_train_timesteps: int | None = None,
        stem_channels: int | None = None,
        norm_group_size: int = 4,
        resnet_out_scale_factor: float = 1.0,
        resample_shortcut: bool = False,
        attend_last_layer_up: bool = False,
        embed_class_first: bool = False,
    ):
        config = dict(self.config)
        super().__init__(
            sample_size=sample_size,
            in_channels=in_channels,
            out_channels=out_channels,
            center_input_sample=center_input_sample,
            time_embedding_type=time_embedding_type,
            time_embedding_dim=time_embedding_dim,
            freq_shift=freq_shift,
            flip_sin_to_cos=flip_sin_to_cos,
            down_block_types=down_block_types,
            up_block_types=up_block_types,
            block_out_channels=block_out_channels,
            layers_per_block=layers_per_block,
            mid_block_scale_factor=resnet_out_scale_factor,
            downsample_type="resnet",
            upsample_type="resnet",
            dropout=dropout,
            attention_head_dim=attention_head_dim,
            norm_num_groups=1,  # until all are set below
            attn_norm_num_groups=1,
            norm_eps=norm_eps,
            resnet_time_scale_shift=resnet_time_scale_shift,
            class_embed_type=class_embed_type,
            num_class_embeds=num_class_embeds,
            num_train_timesteps=num_train_timesteps,
        )
        self._internal_dict = FrozenDict(config)  # without what only the call above was given

        if stem_channels is not None:
            self._set_stem(stem_channels)
        if attend_last_layer_up:
            self._drop_attention_up()
        for module in self.modules():
            if isinstance(module, Attention):
                module.rescale_output_factor = resnet_out_scale_factor
            elif isinstance(module, nn.GroupNorm):
                module.num_groups = min(norm_num_groups, module.num_channels // norm_group_size)
            elif isinstance(module, ResnetBlock2D):
                module.output_scale_factor = resnet_out_scale_factor
                if resample_shortcut and (module.up or module.down):
                    module.conv_shortcut = nn.Conv2d(module.in_channels, module.out_channels, 1)
        if embed_class_first:
            self._embed_class_first()

    def _set_stem(self, channels: int) -> None:
        """Give the first convolution and the embedding of the noise level their own number of channels."""
        config = self.config
        self.conv_in = nn.Conv2d(config.in_channels, channels, 3, padding=1)
        if config.time_embedding_type == "learned":
            self.time_proj = nn.Embedding(config.num_train_timesteps, channels)
        else:
            self.time_proj = Timesteps(channels, config.flip_sin_to_cos, config.freq_shift)
        self.time_embedding = TimestepEmbedding(channels, self.time_embedding.linear_2.out_features)
        widest = config.block_out_channels[0]
        self.down_blocks[0].resnets[0] = self._residual_block(channels, widest)
        self.up_blocks[-1].resnets[-1] = self._residual_block(widest + channels, widest)

    def _residual_block(self, in_channels: int, out_channels: int) -> ResnetBlock2D:
        return ResnetBlock2D(
            in_channels=in_channels,
            out_channels=out_channels,
            temb_channels=self.time_embedding.linear_2.out_features,
            groups=1,
            eps=self.config.norm_eps,
            dropout=self.config.dropout,
            time_embedding_norm=self.config.resnet_time_scale_shift,
        )

    def _drop_attention_up(self) -> None:
        """Leave attention out of all blocks on the way up but the last of each level."""
        for block in self.up_blocks:
            for i in range(len(getattr(block, "attentions", ())) - 1):
                block.attentions[i] = nn.Identity()

    def _embed_class_first(self) -> None:
        """Make the embedding of the noise level linear, and give every block the layers that follow the class."""
        self.time_embedding.act = None
        for module in self.modules():
            if isinstance(module, ResnetBlock2D):
                last = module.time_emb_proj
                module.time_emb_proj = nn.Sequential(nn.Linear(last.in_features, last.in_features), nn.SiLU(), last)
