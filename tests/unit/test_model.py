"""What loading a base does beside loading it."""

import torch


def test_no_base_is_left_to_cudnn_attention(tiny_base):
    torch.backends.cuda.enable_cudnn_sdp(True)
    tiny_base()
    assert not torch.backends.cuda.cudnn_sdp_enabled()
