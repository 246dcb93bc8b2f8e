"""vLLM's copies of states beside drafts, for its CPU worker.

vLLM 0.32 has these copies as kernels for GPUs alone; its layers of delta nets compute
guesses on a CPU, too. Here the copies are those of vLLM's own path without kernels,
and where they go is what the kernel says: a step's accepted tokens may fill a block,
and the state at its end then belongs to that block.

Those layers need as many guesses as are configured, from each request that decodes:
what n-grams lack is filled up.
"""

import numpy as np


def install():
    """Replace the kernels in this process."""
    from vllm.v1.worker import mamba_utils

    preprocess = mamba_utils.preprocess_mamba
    step = {}

    def before_step(*args, align_ctx):
        output, _, _, columns, _, requests, *_ = args
        step.update(output=output, columns=columns, requests=requests)
        preprocess(*args)  # without the kernels' context

    def after_step(
        *,
        bufs,
        num_reqs,
        num_accepted_tokens_gpu,
        num_accepted_tokens_cpu_tensor,
        input_batch,
        kv_cache_config,
        forward_context,
        mamba_state_copy_funcs,
    ):
        buffers, output = bufs.preprocess, step["output"]
        size = buffers.mamba_spec.block_size
        accepted = np.maximum(num_accepted_tokens_gpu[:num_reqs].cpu().numpy(), 1)
        buffers.offset = 0
        for row, name in enumerate(input_batch.req_ids[:num_reqs]):
            state, column = step["requests"][name], step["columns"][name]
            guesses = len(output.scheduled_spec_decode_tokens.get(name, ()))
            count = output.num_scheduled_tokens[name]
            first = state.num_computed_tokens + count - guesses
            full = (first + int(accepted[row]) - 1) // size * size
            if full < first:
                continue
            target = full // size - 1
            if column == target:
                accepted[row] = 1
            mamba_utils.collect_mamba_copy_meta(
                buffers,
                kv_cache_config,
                mamba_state_copy_funcs,
                buffers.mamba_group_ids,
                column,
                target,
                full - first,
                state,
                forward_context,
            )
        mamba_utils.do_mamba_copy_block(buffers)
        for row in range(num_reqs):
            num_accepted_tokens_cpu_tensor[row] = int(accepted[row])

    mamba_utils.preprocess_mamba = before_step
    mamba_utils.stage_postprocess_inputs_to_gpu = lambda *args: None
    mamba_utils.postprocess_mamba_align_gpu = after_step


def fill_guesses(engine):
    """Have an engine's n-grams always guess as many tokens as are configured."""
    worker = engine.engine_core.engine_core.model_executor.driver_worker.worker
    drafter = worker.model_runner.drafter
    propose = drafter.propose

    def propose_all(num_tokens, sampled, *args, **kwargs):
        guesses = propose(num_tokens, sampled, *args, **kwargs)
        return [
            [*some, *said[-1:] * num_tokens][:num_tokens] if said else []
            for some, said in zip(guesses, sampled, strict=True)
        ]

    drafter.propose = propose_all
