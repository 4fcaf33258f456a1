"""Every option of a run, typed, with its meaning. Names are megatron-core's own where it has one.

Field documentation is the string literal below each field; ``tests/unit/config`` holds that none is
missing. ``None`` means "not given": the meaning is then stated. Fields marked ``path()`` are resolved
against the folder of the YAML file they stand in (overrides on the command line: the working directory).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


def path(default: Any = None) -> Any:
    """A field that holds a path; see the module's note on how relative paths are resolved."""
    return field(default=default, metadata={"path": True})


@dataclass
class ModelConfig:
    """The architecture. Give ``hf_path`` or ``preset``; single fields given beside them override."""

    hf_path: str | None = path()
    """Folder with a Hugging Face ``config.json`` from which every field below is read."""
    preset: str | None = None
    """Name of a shape in ``models/families`` (``llama3_8b``, ``llama3_70b``, ...)."""
    model_type: str | None = None
    """Family: the ``model_type`` of the Hugging Face configuration (``llama``, ``mistral``, ``qwen2``, ...)."""
    num_layers: int | None = None
    """Number of transformer layers."""
    hidden_size: int | None = None
    """Width of the residual stream."""
    ffn_hidden_size: int | None = None
    """Width of the gated feed-forward layer (Hugging Face: ``intermediate_size``)."""
    num_attention_heads: int | None = None
    """Number of query heads."""
    num_query_groups: int | None = None
    """Number of key/value heads (grouped-query attention; Hugging Face: ``num_key_value_heads``)."""
    kv_channels: int | None = None
    """Size of one head (Hugging Face: ``head_dim``)."""
    vocab_size: int | None = None
    """Rows of the embedding in the Hugging Face checkpoint, before padding."""
    make_vocab_size_divisible_by: int = 1
    """The embedding is padded to a multiple of this times ``tensor_model_parallel_size``; rows added are
    zero at the start and cut off on export."""
    max_position_embeddings: int | None = None
    """Longest sequence the released model claims to handle."""
    layernorm_epsilon: float | None = None
    """Epsilon of the norms."""
    normalization: Literal["RMSNorm", "LayerNorm"] | None = None
    """Kind of the norms; not given = the family's. LayerNorm has a bias."""
    layernorm_zero_centered_gamma: bool | None = None
    """Whether the norms keep their weight less 1, so that weight decay pulls it to 1; not given = the
    family's. Hugging Face's weight is 1 larger."""
    add_qkv_bias: bool | None = None
    """Whether query, key and value projections have a bias; not given = the family's (Qwen2: yes)."""
    window_size: int | None = None
    """Sliding window: the number of tokens that a token attends to, itself included (Hugging Face:
    ``sliding_window``); not given = all before it."""
    rotary_base: float | None = None
    """Base of the rotary embedding (Hugging Face: ``rope_theta``; 500000 for Llama-3)."""
    rope_scaling_factor: float | None = None
    """Factor of Llama-3.1's rope scaling; not given = no scaling."""
    rope_low_freq_factor: float | None = None
    """Llama-3.1's rope scaling: wavelengths above the original length divided by this are scaled in full; not
    given = 1 where there is a factor."""
    rope_high_freq_factor: float | None = None
    """Llama-3.1's rope scaling: wavelengths below the original length divided by this are left alone; not
    given = 4 where there is a factor."""
    rope_original_max_position_embeddings: int | None = None
    """Llama-3.1's rope scaling: sequence length before the scaling; not given = 8192 where there is a factor."""
    share_embeddings_and_output_weights: bool | None = None
    """Whether input embedding and output layer are one tensor (Hugging Face: ``tie_word_embeddings``)."""
    init_method_std: float | None = None
    """Standard deviation of random initialisation (Hugging Face: ``initializer_range``)."""


@dataclass
class ParallelConfig:
    """How the model is cut. World size = TP x PP x CP x DP."""

    tensor_model_parallel_size: int = 1
    """TP: number of ranks that share each weight matrix."""
    pipeline_model_parallel_size: int = 1
    """PP: number of pipeline stages."""
    virtual_pipeline_model_parallel_size: int | None = None
    """VPP: model chunks per pipeline stage (interleaved 1F1B)."""
    context_parallel_size: int = 1
    """CP: number of ranks that share one sequence, each with two opposite parts of it (balanced causal work)."""
    cp_comm_type: Literal["p2p", "all_gather", "a2a"] | None = None
    """How Transformer Engine exchanges keys and values over CP; not given = p2p. The CPU platform gathers."""
    data_parallel_size: int | None = None
    """DP: number of replicas; not given = world size / (TP x PP x CP)."""
    sequence_parallel: bool = False
    """SP: also cut the norms and the residual stream along the sequence within TP."""
    num_layers_in_first_pipeline_stage: int | None = None
    """Layers of the first stage, when the stages are uneven."""
    num_layers_in_last_pipeline_stage: int | None = None
    """Layers of the last stage, when the stages are uneven."""
    pipeline_model_parallel_layout: str | None = None
    """Explicit layout in megatron-core's notation, one part per chunk, for example ``Et|t|t|ttL``."""
    use_distributed_optimizer: bool = True
    """Shard optimizer state over DP (ZeRO-1)."""
    overlap_grad_reduce: bool = False
    """Overlap the gradient reduction with the backward pass."""
    overlap_param_gather: bool = False
    """Overlap the parameter all-gather with the forward pass (needs ``use_distributed_optimizer``)."""
    ddp_bucket_size: int | None = None
    """Parameters in one bucket of overlapped reduction; not given = the engine's choice."""
    tp_comm_overlap: bool = False
    """Overlap TP communication with the matrix products (Transformer Engine on CUDA, ``sequence_parallel``)."""
    overlap_p2p_comm: bool | None = None
    """Overlap pipeline sends and receives; not given = on exactly when VPP is used."""
    deallocate_pipeline_outputs: bool | None = None
    """Free a stage's output once it is sent; not given = on, but for VPP over gloo."""


@dataclass
class MemoryConfig:
    """Memory against time: what is computed again in the backward pass, what waits in host memory."""

    recompute_granularity: Literal["selective", "full"] | None = None
    """``selective``: the modules of ``recompute_modules``; ``full``: whole layers, by ``recompute_method``."""
    recompute_method: Literal["uniform", "block"] | None = None
    """With ``full``: ``uniform`` = groups of ``recompute_num_layers`` layers, of each of which only the input is
    kept; ``block`` = only the first ``recompute_num_layers`` layers of each model chunk."""
    recompute_num_layers: int | None = None
    """With ``full``: see ``recompute_method``; not given = 1 for ``uniform``, all layers for ``block``."""
    recompute_modules: list[str] = field(default_factory=list)
    """With ``selective``: ``core_attn``, ``mlp``, ``layernorm``; not given = ``core_attn``."""
    distribute_saved_activations: bool = False
    """With ``full``: kept inputs are cut over TP (not beside ``sequence_parallel``, which cuts them already)."""
    loss_chunk_tokens: int | None = None
    """Compute output layer and loss in parts of so many tokens (of this rank, samples together), each part's logits
    once more in the backward pass: they never stand whole. Not given = whole."""
    cpu_offloading: bool = False
    """Keep activations of ``cpu_offloading_num_layers`` layers in host memory (Transformer Engine on CUDA, PP 1)."""
    cpu_offloading_num_layers: int | None = None
    """Layers of ``cpu_offloading``; not given = all but the last."""


@dataclass
class SourceConfig:
    """One source of text, tokenised by ``tools/prepare_data.py``."""

    path: str = field(default="", metadata={"path": True, "required": True})
    """Prefix of the ``.bin``/``.idx``/``.json`` files."""
    order: Literal["shuffled", "ordered"] = "shuffled"
    """``shuffled``: documents in a new random order in each epoch; ``ordered``: as they stand in the file, or by
    ``order_by``, in every epoch."""
    order_by: str | None = None
    """With ``ordered``: a number stored with each document (``prepare_data.py --keep``), read from low to high;
    equal ones as they stand in the file."""
    max_epochs: float = field(default=1.0, metadata={"infinite": True})
    """How often the source may be read; a mixture that needs more is refused. ``.inf`` = as often as needed."""
    first_tokens: int | None = None
    """Use only the first documents of the file, until they hold this many tokens."""
    top_fraction: float | None = None
    """Use only the best documents, until they hold this share of the tokens (``top_by`` says what is best)."""
    top_by: str | None = None
    """The number stored with each document that ``top_fraction`` goes by."""
    top_is: Literal["highest", "lowest"] = "highest"
    """Whether the best documents are those with the highest or the lowest number."""


@dataclass
class StageScheduleConfig:
    """A stage's own values of ``schedule`` and ``optimizer`` (``schedule.span: stage``); not given = the run's."""

    lr: float | None = None
    """Peak learning rate of the stage."""
    min_lr: float | None = None
    """Learning rate at the end of the stage's decay."""
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] | None = None
    """Shape after the stage's warm-up."""
    lr_warmup_init: float | None = None
    """Learning rate at the stage's first step."""
    lr_warmup_iters: int | None = None
    """Length of the stage's warm-up in iterations; this or ``lr_warmup_tokens``."""
    lr_warmup_tokens: int | None = None
    """Length of the stage's warm-up in tokens."""
    lr_wsd_decay_iters: int | None = None
    """Length of WSD's decay at the end of the stage, in iterations; 0 = none."""
    lr_wsd_decay_tokens: int | None = None
    """Length of WSD's decay at the end of the stage, in tokens."""
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt", "clipped_linear"] | None = (
        None
    )
    """Shape of WSD's decay."""


@dataclass
class StageConfig:
    """One stage of a run, as Llama-3-SynE's bilingual adaptation and synthetic enhancement, with what is its own."""

    name: str = field(default="", metadata={"required": True})
    """Name shown in logs and tensorboard."""
    tokens: int = field(default=0, metadata={"required": True})
    """Token budget of the stage; rounded up to whole global batches."""
    mixture: dict[str, Any] = field(default_factory=dict)
    """Share of each source: ``source: 0.2``, or a group ``zh: {share: 0.2, of: {zh_web: 0.7, zh_book: 0.3}}``
    to any depth. Shares of one level must sum to 1."""
    seq_length: int | None = None
    """Tokens per sample in this stage; not given = ``data.seq_length``."""
    global_batch_size: int | None = None
    """Samples per optimizer step in this stage; not given = ``train.global_batch_size``."""
    micro_batch_size: int | None = None
    """Samples per forward pass of one replica in this stage; not given = ``train.micro_batch_size``."""
    rampup_batch_size: list[int] = field(default_factory=list)
    """``[start, increment, samples]``: the stage's global batch grows from ``start`` by ``increment`` to its size,
    evenly over its first ``samples`` samples (megatron-core's rule). Not given = none."""
    rotary_base: float | None = None
    """Base of the rotary embedding from this stage on; not given = as before it."""
    max_position_embeddings: int | None = None
    """Longest sequence that a model released from this stage on claims to handle; not given = as before it."""
    freeze: list[str] | None = None
    """As ``optimizer.freeze``, for this stage; not given = ``optimizer``'s."""
    train_only: list[str] | None = None
    """As ``optimizer.train_only``, for this stage; not given = ``optimizer``'s."""
    reset_optimizer: bool = False
    """Begin the stage with new moments; a parameter that did not train before begins with new ones anyway."""
    schedule: StageScheduleConfig | None = None
    """The stage's own learning rate, with ``schedule.span: stage``."""


@dataclass
class ReweightingConfig:
    """Online re-weighting of the sources in one group by their validation perplexity (Llama-3-SynE's topics)."""

    group: str = field(default="", metadata={"required": True})
    """Name of a group in a stage's mixture; every source in it needs a validation source of the same name."""
    interval: int = field(default=0, metadata={"required": True})
    """Iterations from one adjustment to the next: a multiple of ``train.eval_interval``."""
    alpha: float = 0.1
    """Strength: a source's share is multiplied by 1 + alpha x delta x weight before all are normalised."""
    weights: dict[str, float] = field(default_factory=dict)
    """Weight of single sources; not given = 1."""


@dataclass
class DataConfig:
    """What is read, in which proportion, in which order."""

    seq_length: int = 1024
    """Tokens per sample that are predicted, of validation and of stages without a length of their own; a sample
    holds ``seq_length + 1`` tokens."""
    tokenizer_path: str | None = path()
    """Folder of the tokenizer; its files are copied into the exported Hugging Face folder."""
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    """Training sources by name."""
    validation: dict[str, SourceConfig] = field(default_factory=dict)
    """Validation sources by name; each gets its own loss and perplexity."""
    stages: list[StageConfig] = field(default_factory=list)
    """Stages in the order they are trained; a change of stage falls on a global-batch boundary. A run that goes
    on may have them changed from the stage that it has reached: each source goes on where it stands."""
    packing: Literal["concatenated", "best_fit"] = "concatenated"
    """``concatenated``: documents one after another, cut at the sequence length (Llama-3-SynE); ``best_fit``: whole
    documents fitted into samples, padded; only longer ones are cut."""
    reset_attention_mask: bool = False
    """A token attends only to its own document."""
    reset_position_ids: bool = False
    """Positions count from each document's begin (rotary positions are relative: with ``reset_attention_mask``
    they do so in effect; this says it in the batch too)."""
    eod_mask_loss: bool = False
    """Leave out of the loss what is predicted from the end of a document: the next one's first token."""
    reweighting: list[ReweightingConfig] = field(default_factory=list)
    """Groups whose shares follow the validation perplexity."""
    index_cache: str | None = path()
    """Folder of the orders of documents, made once and shared by all ranks; not given = below ``run_dir``."""
    loader: Literal["thread", "dali"] = "thread"
    """What prepares batches ahead: a thread, or NVIDIA DALI (if installed); the batches are the same."""
    mock: bool = False
    """Use reproducible random tokens in place of sources (benchmarks, layout tests)."""


@dataclass
class ParamGroupConfig:
    """Parameters with a learning rate or weight decay of their own."""

    match: str = field(default="", metadata={"required": True})
    """Pattern of their names, as ``optimizer.freeze``; where several groups match, the first counts."""
    lr_mult: float = 1.0
    """Their learning rate is the schedule's times this."""
    wd_mult: float | None = None
    """Their weight decay is ``weight_decay`` times this; not given = as without the group."""


@dataclass
class OptimizerConfig:
    """AdamW, as megatron-core's ``OptimizerConfig``, and what it trains."""

    lr: float = 1e-5
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay."""
    adam_beta1: float = 0.9
    """First-moment decay."""
    adam_beta2: float = 0.95
    """Second-moment decay."""
    adam_eps: float = 1e-8
    """Epsilon of Adam."""
    weight_decay: float = 0.1
    """Decoupled weight decay (not applied to norms and biases)."""
    clip_grad: float = 1.0
    """Clip the global gradient norm to this; 0 = no clipping."""
    decay_norms_and_biases: bool = False
    """Apply the weight decay to norms and biases too."""
    freeze: list[str] = field(default_factory=list)
    """Patterns (``*`` and ``?``) of parameters that do not train: ``embedding.*``, ``decoder.layers.3.*``,
    ``output_layer.*``; ``layers.original`` and ``layers.new`` are the layers that were there before a block
    expansion and those it added (``surgery.json`` beside the weights). What is frozen has no optimizer state."""
    train_only: list[str] = field(default_factory=list)
    """Patterns of the only parameters that train; not given = all. With ``freeze``: these less the frozen."""
    groups: list[ParamGroupConfig] = field(default_factory=list)
    """Parameters with their own learning rate or weight decay."""
    use_precision_aware_optimizer: bool = False
    """Keep master weights, main gradients and moments in the formats below (with ``use_distributed_optimizer``
    and bf16 weights)."""
    main_grads_dtype: Literal["fp32", "bf16"] = "fp32"
    """Format of the main gradients; must be what ``precision.accumulate_allreduce_grads_in_fp32`` reduces in."""
    main_params_dtype: Literal["fp32", "fp16"] = "fp32"
    """Format of the master weights."""
    exp_avg_dtype: Literal["fp32", "bf16", "fp16", "fp8"] = "fp32"
    """Format of the first moment."""
    exp_avg_sq_dtype: Literal["fp32", "bf16", "fp16", "fp8"] = "fp32"
    """Format of the second moment; ``fp8`` is refused, since it loses the small ones."""
    optimizer_cpu_offload: bool = False
    """Keep ``optimizer_offload_fraction`` of the optimizer state in host memory and step it there (CUDA)."""
    optimizer_offload_fraction: float = 1.0
    """Share of the parameters whose optimizer state is offloaded."""
    overlap_cpu_optimizer_d2h_h2d: bool = False
    """Overlap the offloaded step with its copies."""


@dataclass
class ScheduleConfig:
    """Learning rate over the run, as megatron-core's ``OptimizerParamScheduler``."""

    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = "WSD"
    """Shape after the warm-up. ``linear`` with ``optimizer.min_lr`` 0 is Straight to Zero (arXiv 2502.15938)."""
    span: Literal["run", "stage"] = "run"
    """``run``: one schedule over all stages; ``stage``: begun anew in each stage, over its length, with what
    ``data.stages[].schedule`` changes."""
    lr_warmup_init: float = 0.0
    """Learning rate at step 0, from which the warm-up rises linearly (Llama-3-SynE: 1e-7)."""
    lr_warmup_iters: int | None = None
    """Length of the warm-up in iterations; give this or ``lr_warmup_tokens``."""
    lr_warmup_tokens: int | None = None
    """Length of the warm-up in tokens (Llama-3-SynE: 10 billion)."""
    lr_decay_iters: int | None = None
    """Iteration at which the decay ends; not given = ``train_iters``."""
    lr_wsd_decay_iters: int | None = None
    """Length of WSD's final decay in iterations; 0 or not given = never decays (as Llama-3-SynE ran)."""
    lr_wsd_decay_tokens: int | None = None
    """Length of WSD's final decay in tokens; this or ``lr_wsd_decay_iters``."""
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt", "clipped_linear"] = (
        "exponential"
    )
    """Shape of WSD's final decay; ``clipped_linear`` is Llama-3-SynE's: a line to 0, cut off at ``min_lr``."""


@dataclass
class Fp8GuardConfig:
    """Watches FP8 against bf16 during training, and falls back where it goes wrong."""

    interval: int | None = None
    """Iterations between two looks: one micro-batch is also run forward in bf16; not given = never."""
    max_loss_gap: float | None = None
    """Largest difference of the two losses, relative to bf16's; above it, or where only bf16's is finite, all layers
    fall back to bf16 from that step on."""
    max_overflow: float | None = None
    """Largest share of a tensor's values beyond the format's range; above it the layer falls back to bf16."""
    max_underflow: float | None = None
    """Largest share of a tensor's values that are not zero and become so; above it the layer falls back."""


@dataclass
class PrecisionConfig:
    """Number formats."""

    params_dtype: Literal["bf16", "fp32"] = "bf16"
    """Format of weights and activations; with bf16 the optimizer keeps fp32 master weights."""
    accumulate_allreduce_grads_in_fp32: bool = True
    """Accumulate and reduce gradients in fp32."""
    fp8: Literal["delayed", "tensorwise", "blockwise"] | None = None
    """FP8 recipe of the linear layers: Transformer Engine's on CUDA, emulated on the CPU platform. Attention,
    norms, embedding and output layer stay in bf16."""
    fp8_emulation: bool | None = None
    """Whether FP8 is emulated (bf16 products of values rounded to FP8); not given = on the CPU platform only."""
    fp8_format: Literal["hybrid", "e4m3"] = "hybrid"
    """FP8 formats: hybrid = E4M3 forward, E5M2 for gradients."""
    fp8_margin: int = 0
    """Delayed scaling leaves 2 ** margin of room above the largest value."""
    fp8_amax_history_len: int = 1024
    """Delayed scaling: micro-batches whose largest absolute value is remembered (Transformer Engine's count)."""
    fp8_amax_compute_algo: Literal["max", "most_recent"] = "max"
    """Delayed scaling: which of them decides the scale."""
    first_last_layers_bf16: bool = False
    """Keep the first and the last layers in bf16 under FP8 (megatron-core: not with ``delayed``)."""
    num_layers_at_start_in_bf16: int = 1
    """With ``first_last_layers_bf16``: layers at the start."""
    num_layers_at_end_in_bf16: int = 1
    """With ``first_last_layers_bf16``: layers at the end."""
    fp8_param_gather: bool = False
    """Keep and gather the weights in FP8."""
    fp8_guard: Fp8GuardConfig = field(default_factory=Fp8GuardConfig)
    """Watching FP8."""


@dataclass
class TrainConfig:
    """Batches, length, evaluation."""

    micro_batch_size: int = 1
    """Samples per forward pass of one replica, of validation and of stages without their own."""
    global_batch_size: int = 8
    """Samples per optimizer step over all replicas, of validation and of stages without their own."""
    rampup_batch_size: list[int] = field(default_factory=list)
    """``[start, increment, samples]`` for the first stage, as ``data.stages[].rampup_batch_size``."""
    train_iters: int | None = None
    """Number of optimizer steps; not given = the token budgets of ``data.stages``."""
    exit_interval: int | None = None
    """Save and stop cleanly (exit 75) once the iteration is a multiple of this."""
    eval_interval: int | None = None
    """Evaluate every so many iterations; not given = never."""
    eval_iters: int = 10
    """Global batches per validation source at each evaluation; fewer where the source is shorter."""
    z_loss: float = 0.0
    """Weight of the squared log of the softmax's denominator, added to the loss (OLMo 2: 1e-5); 0 = none."""
    neftune_noise_alpha: float = 0.0
    """Uniform noise on the embeddings while training, of size alpha / sqrt(seq_length x hidden_size) (NEFTune,
    arXiv 2310.05914); 0 = none."""
    seed: int = 1234
    """Seed of initialisation, shuffling and noise."""
    deterministic_mode: bool = False
    """Only kernels that give the same bits in every run (slower): a resumed run then repeats an uninterrupted one to
    the last bit on CUDA too. The CPU platform does so in any case."""


@dataclass
class CheckpointConfig:
    """Where to start and what to keep."""

    initialize_from: str | None = path()
    """Weights to start from when the run folder holds no checkpoint: a Hugging Face folder, a folder of
    converted shards, or a training checkpoint of another run (weights only). Not given = random."""
    branch_from: str | None = path()
    """Checkpoint of another run that this one branches off (a decay from a stable run): weights, optimizer,
    counters and the account of the data are taken; ``data.stages`` holds the branch's own stages, which follow."""
    save_interval: int | None = None
    """Save every so many iterations; a last checkpoint is written at the end in any case."""
    keep_latest: int = 3
    """Number of checkpoints kept; 0 = all."""
    async_save: bool = False
    """Write checkpoints beside the training: a step waits only until its values are copied to host memory, which then
    holds this rank's part of a checkpoint (in bf16 12 bytes for each of its parameters, over the data-parallel ranks,
    and 2 more on the first of them). The last one is waited for."""


@dataclass
class HarnessConfig:
    """lm-evaluation-harness on exported snapshots, beside the training (extra ``eval``)."""

    tasks: list[str] = field(default_factory=list)
    """Its task names, or YAML files of tasks (in ``include_path``, or else relative to the current folder); not
    given = no evaluation by it."""
    include_path: str | None = path()
    """Folder with further task files."""
    interval: int | None = None
    """Iterations between two evaluations: a multiple of ``checkpoint.save_interval``; not given = each
    checkpoint. The last checkpoint is evaluated in any case."""
    num_fewshot: int | None = None
    """Examples in the context; not given = the task's own."""
    limit: int | None = None
    """Documents of each task; not given = all."""
    batch_size: int = 1
    """Sequences at a time."""
    device: str = "cpu"
    """torch device of the evaluating process."""
    timeout_seconds: int = 3600
    """An evaluation that takes longer is ended and reported as failed; training goes on."""


@dataclass
class ResilienceConfig:
    """Stopping and waiting."""

    exit_signals: list[str] = field(default_factory=lambda: ["SIGTERM", "SIGUSR1"])
    """Signals after which the run saves at the next step boundary and exits with 75."""
    distributed_timeout_seconds: int = 600
    """A collective that waits longer than this ends the run."""


@dataclass
class MonitorConfig:
    """What is shown and written."""

    log_interval: int = 1
    """Write metrics every so many iterations."""
    tensorboard: bool = True
    """Write tensorboard events to ``<run_dir>/tensorboard``."""
    progress: bool = True
    """Show a progress line on the console of rank 0."""
    norms_interval: int | None = 10
    """Log the norm of the parameters (before the update) and the gradient norm of each layer every so many iterations,
    whatever ``log_interval``; null = never."""
    loss_per_source: bool = True
    """Log the training loss of each source beside the whole."""
    wandb_project: str | None = None
    """Also log to this Weights & Biases project (needs the package; ``WANDB_MODE=offline`` keeps it on disk)."""
    wandb_name: str | None = None
    """Name of the run there; not given = the name of the run folder."""
    peak_flops: float | None = None
    """FLOP/s of one GPU that MFU is of; not given = the data sheet's of a GPU that the planner knows, else no MFU."""


@dataclass
class LaunchConfig:
    """How ``launch/slurm.py`` asks for machines. Nothing here changes the numbers of a run."""

    job_name: str = "syne"
    """Name of the Slurm job."""
    nodes: int = 1
    """Number of nodes."""
    ntasks_per_node: int = 8
    """Processes per node: one per GPU."""
    gpus_per_node: int = 8
    """GPUs asked for on each node; 0 = none (CPU platform)."""
    cpus_per_task: int | None = None
    """CPU cores per process."""
    time: str = "24:00:00"
    """Time limit, in Slurm's notation."""
    partition: str | None = None
    """Partition."""
    account: str | None = None
    """Account."""
    qos: str | None = None
    """Quality of service."""
    signal_lead_seconds: int = 300
    """The job is signalled this long before its limit; it saves and is requeued. Must exceed the time of one
    step and one checkpoint; Slurm looks about every 30 s."""
    max_no_progress: int = 3
    """Requeue stops after this many starts in a row that saved nothing new."""
    python: str = "python3"
    """Python interpreter of the environment on the nodes."""
    setup_lines: list[str] = field(default_factory=list)
    """Shell lines run before ``srun`` (module loads, environment activation)."""
    env: dict[str, str] = field(default_factory=dict)
    """Environment variables exported to every rank."""
    srun_args: list[str] = field(default_factory=list)
    """Extra arguments of ``srun`` (for instance a container image)."""
    sbatch_args: list[str] = field(default_factory=list)
    """Extra ``#SBATCH`` options, for example ``--exclusive``."""


@dataclass
class RunConfig:
    """A whole run."""

    run_dir: str = field(default="", metadata={"path": True, "required": True})
    """Folder of the run: configuration, logs, tensorboard, checkpoints."""
    platform: Literal["auto", "cpu", "cuda"] = "auto"
    """Where it runs; ``auto`` = cuda where there is a GPU. ``cpu`` hides GPUs from the run."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Architecture."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Layout."""
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    """Memory."""
    data: DataConfig = field(default_factory=DataConfig)
    """Data."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """Learning rate."""
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    """Number formats."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Batches and length."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Start and saving."""
    harness: HarnessConfig = field(default_factory=HarnessConfig)
    """lm-evaluation-harness."""
    resilience: ResilienceConfig = field(default_factory=ResilienceConfig)
    """Stopping."""
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    """Watching."""
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    """Slurm."""
