# shellcheck shell=bash
# Named sets of XLA flags; sourced by launch/host.sh, which reads XLA_PRESET=NAME.
#
# All are off by default: none was measured on this project's models. Measure before you keep one:
# perf/images_per_sec_per_chip in metrics.jsonl, over a few hundred steps with and without.

# xla_preset NAME: exports XLA_FLAGS or LIBTPU_INIT_ARGS, in front of which what was set there stays.
xla_preset() {
  case $1 in
    gpu-overlap)
      # Moves the gradients' all-reduces behind the matmuls of the backward pass. It needs memory for
      # what is under way; in NVIDIA's JAX images it is on.
      XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_enable_latency_hiding_scheduler=true"
      ;;
    gpu-fsdp)
      # As above, for meshes with fsdp > 1: a few large collectives instead of one for each parameter.
      XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_enable_latency_hiding_scheduler=true"
      XLA_FLAGS+=" --xla_gpu_all_gather_combine_threshold_bytes=134217728"
      XLA_FLAGS+=" --xla_gpu_reduce_scatter_combine_threshold_bytes=134217728"
      ;;
    gpu-deterministic)
      # The same bits in every run, at the price of slower kernels: atomic additions are not used.
      XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_deterministic_ops=true"
      ;;
    tpu-overlap)
      # All-gathers and all-reduces run beside the matmuls instead of between them; for fsdp > 1.
      LIBTPU_INIT_ARGS="${LIBTPU_INIT_ARGS:-} --xla_tpu_enable_async_collective_fusion=true"
      LIBTPU_INIT_ARGS+=" --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true"
      LIBTPU_INIT_ARGS+=" --xla_tpu_overlap_compute_collective_tc=true"
      LIBTPU_INIT_ARGS+=" --xla_enable_async_all_gather=true"
      ;;
    *)
      echo "XLA_PRESET=$1: there are gpu-overlap, gpu-fsdp, gpu-deterministic, tpu-overlap" >&2
      return 2
      ;;
  esac
  export XLA_FLAGS="${XLA_FLAGS:-}" LIBTPU_INIT_ARGS="${LIBTPU_INIT_ARGS:-}"
}
