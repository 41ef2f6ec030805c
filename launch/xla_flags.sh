# shellcheck shell=bash
# Named sets of XLA flags. launch/host.sh sources this file and applies XLA_PRESET=NAME.
#
# All are off by default, because none was measured on this project's models. Measure before you keep one:
# compare perf/images_per_sec_per_chip in metrics.jsonl over a few hundred steps with and without it.

# xla_preset NAME: append its flags to XLA_FLAGS or LIBTPU_INIT_ARGS, and export both.
xla_preset() {
  case $1 in
    gpu-overlap)
      # Overlaps the all-reduces of gradients with the matmuls of the backward pass. It needs memory for
      # the transfers in progress. NVIDIA's JAX images turn it on.
      XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_enable_latency_hiding_scheduler=true"
      ;;
    gpu-fsdp)
      # The same for meshes with fsdp > 1, and a few large collectives instead of one for each parameter.
      XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_enable_latency_hiding_scheduler=true"
      XLA_FLAGS+=" --xla_gpu_all_gather_combine_threshold_bytes=134217728"
      XLA_FLAGS+=" --xla_gpu_reduce_scatter_combine_threshold_bytes=134217728"
      ;;
    gpu-deterministic)
      # Gives the same bits in every run, but has slower kernels, without atomic additions.
      XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_deterministic_ops=true"
      ;;
    tpu-overlap)
      # Overlaps all-gathers and all-reduces with matmuls; for meshes with fsdp > 1.
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
