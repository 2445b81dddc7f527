"""Stock Megatron on the CPU device: the same program without our spec, hooks and warmup."""

from megatron_prores.command_line import device
from megatron_prores.errors import run_program


def main() -> None:
    device.prepare("cpu")
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import (
        gpt_config_from_args,
        pretrain_cfg_container_from_args,
    )

    from megatron_prores.command_line.arguments import parse_args
    from megatron_prores.training.gpt import forward_step, train_valid_test_datasets_provider
    from megatron_prores.upstream import datasets, optimizer
    from megatron_prores.warmup.scalars import close_tensorboard

    datasets.use_prebuilt_dataset_helpers()
    optimizer.let_torch_adam_resume()
    datasets.fork_data_workers()
    args, _ = parse_args("cpu")
    config = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
    pretrain(config, train_valid_test_datasets_provider, ModelType.encoder_or_decoder, forward_step)
    close_tensorboard()


if __name__ == "__main__":
    run_program(main)
