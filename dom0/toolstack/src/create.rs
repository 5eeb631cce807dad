//! Makes a domain: creates it empty, fills its memory, has its page tables checked, sets its first vcpu, writes its
//! place in the store. Then back ends add its devices, and [`Guest::start`] lets it run.

use alloc::borrow::Cow;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt;

use guest_image::{Builder, Config, Kernel, MachineFrame, PAGE_SIZE, Pfn, Plan, Start, Wiring};
use hypercall_abi::context::{UserRegs, VcpuContext, flags};
use hypercall_abi::grant::{Entry, REF_CONSOLE, REF_XENSTORE, entry};
use hypercall_abi::selector;
use zerocopy::IntoBytes;

use crate::config::GuestConfig;
use crate::privileged::{DomainId, Hypervisor, Progress};
use crate::tree::{self, Store};
use crate::unpack::unpack_within;

/// Pages requested in one call.
const BATCH: usize = 512;
/// L1 tables pinned in one call: as many entries as the hypervisor checks in one step of it.
pub const LEAVES: usize = 8;
/// Pages filled between two pauses.
pub const PIECE: u64 = 512;
const PAGES_PER_MIB: u64 = (1 << 20) / PAGE_SIZE;
/// Interrupts enabled, and the bit that is always set. A guest masks its interrupts by its upcall mask, not by this
/// flag.
const FIRST_RFLAGS: u64 = 0x202;
/// Protected mode, paging, write protection, and a coprocessor.
const FIRST_CR0: u64 = 0x8005_0033;

/// What a domain is made from.
#[derive(Clone, Copy)]
pub struct Request<'a> {
    /// The guest's configuration.
    pub config: &'a GuestConfig,
    /// The kernel, an ELF file: see [`unpacked`].
    pub kernel: &'a [u8],
    /// The ramdisk, empty for none.
    pub ramdisk: &'a [u8],
    /// The guest's UUID, of random bytes.
    pub uuid: [u8; 16],
    /// The domain that serves the guest's store and console.
    pub backend: DomainId,
}

/// A page shared with the domain, and the domain's port to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ring {
    /// The page.
    pub page: MachineFrame,
    /// The domain's port, to be bound by the backend.
    pub port: u32,
}

/// A guest that has a domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Guest {
    /// The domain's number.
    pub domain: DomainId,
    /// The guest's UUID; unlike a domain's number it is never used again.
    pub uuid: [u8; 16],
    /// The configuration it was made from.
    pub config: GuestConfig,
    /// Its store ring.
    pub store: Ring,
    /// Its console ring.
    pub console: Ring,
    /// The domain that serves both rings.
    pub backend: DomainId,
}

/// The step that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "see Display")]
pub enum Step {
    Unpack,
    Plan,
    CreateDomain,
    LimitMemory,
    FindSharedInfo,
    Populate,
    OpenPorts,
    Fill,
    SeedGrants,
    PinRoot,
    SetVcpu,
    WriteTree,
    Introduce,
    Unpause,
    GiveUp,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Unpack => "unpacking the kernel",
            Self::Plan => "planning its memory",
            Self::CreateDomain => "creating the domain",
            Self::LimitMemory => "setting its memory limit",
            Self::FindSharedInfo => "finding its shared-info page",
            Self::Populate => "giving it memory",
            Self::OpenPorts => "opening its ports",
            Self::Fill => "filling its memory",
            Self::SeedGrants => "granting its rings",
            Self::PinRoot => "pinning its page tables",
            Self::SetVcpu => "setting its first vcpu",
            Self::WriteTree => "writing its store entries",
            Self::Introduce => "introducing it to the store",
            Self::Unpause => "letting it run",
            Self::GiveUp => "giving it up",
        })
    }
}

/// A guest could not be made. Everything made for it has been removed, except what `left_over` names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CreateError {
    /// The guest's name.
    pub name: String,
    /// The step that failed.
    pub step: Step,
    /// Why it failed.
    pub why: String,
    /// What could not be removed, and why.
    pub left_over: Vec<String>,
}

impl fmt::Display for CreateError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "guest {}: {}: {}", self.name, self.step, self.why)?;
        self.left_over.iter().try_for_each(|what| write!(f, "; left over: {what}"))
    }
}

impl core::error::Error for CreateError {}

/// A failed step, whose effects are still to be undone.
struct Failed(Step, String);

/// Turns any error into a failure of `step`.
fn at<E: fmt::Display>(step: Step) -> impl FnOnce(E) -> Failed {
    move |error| Failed(step, error.to_string())
}

/// The error for a failure before there is a domain.
fn refused(config: &GuestConfig, Failed(step, why): Failed) -> CreateError {
    CreateError { name: config.name.clone(), step, why, left_over: Vec::new() }
}

/// Returns the ELF file of a guest's kernel, unpacking a bzImage. The ELF file may have at most `limit` bytes,
/// unpacking it may take at most `room` bytes. Unpacking takes long, so `pause` is called after every piece.
///
/// # Errors
/// Why the kernel cannot be unpacked.
pub async fn unpacked<'a>(
    config: &GuestConfig,
    kernel: &'a [u8],
    (limit, room): (usize, usize),
    pause: impl AsyncFn(),
) -> Result<Cow<'a, [u8]>, CreateError> {
    unpack_within(kernel, limit, room, pause).await.map_err(at(Step::Unpack)).map_err(|why| refused(config, why))
}

/// Makes a domain, paused. `go_on` is called after every piece of at most [`PIECE`] pages: it lets other tasks run, and
/// returns whether the domain is still wanted.
///
/// # Errors
/// The step that failed and why; [`Step::GiveUp`] if the domain is no longer wanted. Everything made so far is
/// destroyed first.
pub async fn create<H: Hypervisor, S: Store>(
    hypervisor: &H,
    store: &S,
    request: &Request<'_>,
    go_on: impl AsyncFn() -> bool,
) -> Result<Guest, CreateError> {
    let nothing_yet = |why| refused(request.config, why);
    // Everything that can be checked without a domain is checked before there is one.
    let plan = plan(request).map_err(nothing_yet)?;
    let created = hypervisor.create(&request.uuid, request.config.vcpus);
    let domain = created.map_err(at(Step::CreateDomain)).map_err(nothing_yet)?;

    let go_on = async || match go_on().await {
        true => Ok(()),
        false => Err(Failed(Step::GiveUp, "it is not wanted any more".into())),
    };
    let built = build(hypervisor, domain, &plan, request, &go_on).await.and_then(|guest| {
        let nodes = tree::nodes(&guest, request.backend);
        store.write(domain, &nodes).map_err(at(Step::WriteTree))?;
        Ok(guest)
    });
    match built {
        Ok(guest) => Ok(guest),
        Err(Failed(step, why)) => {
            // The tree is written as a whole or not at all, so there is nothing to remove from it.
            let destroyed = end_domain(hypervisor, domain, async || drop(go_on().await)).await;
            let left_over = destroyed.err().map(|error| format!("domain {domain}: {error}"));
            Err(CreateError { left_over: left_over.into_iter().collect(), ..nothing_yet(Failed(step, why)) })
        }
    }
}

/// Destroys a domain; `pause` is called after every piece.
async fn end_domain<H: Hypervisor>(hypervisor: &H, domain: DomainId, pause: impl AsyncFn()) -> Result<(), H::Error> {
    while hypervisor.destroy(domain)? == Progress::More {
        pause().await;
    }
    Ok(())
}

fn plan<'a>(request: &Request<'a>) -> Result<Plan<'a>, Failed> {
    let config = Config {
        nr_pages: request.config.memory * PAGES_PER_MIB,
        ramdisk: request.ramdisk,
        command_line: request.config.extra.as_bytes(),
        // Neither privileged nor the first domain.
        flags: 0,
        rings: true,
    };
    Kernel::parse(request.kernel).and_then(|kernel| Plan::new(kernel, config)).map_err(at(Step::Plan))
}

/// Turns an empty domain into a guest: memory, ports, page tables and vcpu.
async fn build<H: Hypervisor>(
    hypervisor: &H,
    domain: DomainId,
    plan: &Plan<'_>,
    request: &Request<'_>,
    go_on: &impl AsyncFn() -> Result<(), Failed>,
) -> Result<Guest, Failed> {
    let config = request.config;
    hypervisor.set_max_memory(domain, config.maxmem << 10).map_err(at(Step::LimitMemory))?;
    let info = hypervisor.info(domain).map_err(at(Step::FindSharedInfo))?;
    let info = info.filter(|info| info.domain == domain.0);
    let shared_info = info.ok_or_else(|| Failed(Step::FindSharedInfo, "no such domain".into()))?.shared_info_frame;
    let frames = populate(hypervisor, domain, plan.config.nr_pages, go_on).await?;

    let open = || hypervisor.open_port(domain, request.backend).map_err(at(Step::OpenPorts));
    let (store_port, console_port) = (open()?, open()?);
    let wiring = Wiring { shared_info: MachineFrame(shared_info), store_port, console_port };
    let mut memory = Memory { hypervisor, domain, frames: &frames };
    let start = fill(plan, &mut memory, &wiring, go_on).await?;
    let leaves: Result<Vec<MachineFrame>, String> = plan.leaf_tables().map(|leaf| memory.frame_of(leaf)).collect();
    let leaves = leaves.map_err(at(Step::PinRoot))?;

    let rings = start.store.zip(start.console).ok_or_else(|| Failed(Step::SeedGrants, "no ring pages".into()))?;
    seed_grants(hypervisor, domain, request.backend, rings)?;
    pin(hypervisor, domain, (&leaves, start.root), go_on).await?;
    hypervisor.set_vcpu(domain, 0, &first_context(&start)).map_err(at(Step::SetVcpu))?;
    Ok(Guest {
        domain,
        uuid: request.uuid,
        config: config.clone(),
        store: Ring { page: rings.0, port: store_port },
        console: Ring { page: rings.1, port: console_port },
        backend: request.backend,
    })
}

/// Allocates frames for all pages, in batches so that no single call is long.
async fn populate<H: Hypervisor>(
    hypervisor: &H,
    domain: DomainId,
    nr_pages: u64,
    go_on: &impl AsyncFn() -> Result<(), Failed>,
) -> Result<Vec<MachineFrame>, Failed> {
    let mut frames = Vec::new();
    let count = usize::try_from(nr_pages).unwrap_or(usize::MAX);
    frames.try_reserve_exact(count).map_err(at(Step::Populate))?;
    frames.resize(count, MachineFrame(0));
    let mut first = 0;
    for batch in frames.chunks_mut(BATCH) {
        let got = hypervisor.populate(domain, Pfn(first), batch).map_err(at(Step::Populate))?;
        first += got as u64;
        if got != batch.len() {
            let (had, wanted) = (first / PAGES_PER_MIB, nr_pages / PAGES_PER_MIB);
            let why = format!("the machine has only {had} of {wanted} MiB left");
            return Err(Failed(Step::Populate, why));
        }
        go_on().await?;
    }
    Ok(frames)
}

/// Writes the domain's memory as planned, a piece at a time.
async fn fill<H: Hypervisor>(
    plan: &Plan<'_>,
    memory: &mut Memory<'_, H>,
    wiring: &Wiring,
    go_on: &impl AsyncFn() -> Result<(), Failed>,
) -> Result<Start, Failed> {
    for piece in plan.pieces(PIECE) {
        plan.write(memory, wiring, &piece).map_err(at(Step::Fill))?;
        go_on().await?;
    }
    plan.start(memory).map_err(at(Step::Fill))
}

/// Has the page tables checked and pinned, the leaves first: checking all below the root at once would take one call,
/// however large the domain.
async fn pin<H: Hypervisor>(
    hypervisor: &H,
    domain: DomainId,
    (leaves, root): (&[MachineFrame], MachineFrame),
    go_on: &impl AsyncFn() -> Result<(), Failed>,
) -> Result<(), Failed> {
    for some in leaves.chunks(LEAVES) {
        hypervisor.pin_leaves(domain, some).map_err(at(Step::PinRoot))?;
        go_on().await?;
    }
    hypervisor.pin_root(domain, root).map_err(at(Step::PinRoot))?;
    for some in leaves.chunks(LEAVES) {
        hypervisor.unpin_leaves(domain, some).map_err(at(Step::PinRoot))?;
    }
    go_on().await
}

/// The domain's memory, to which the plan is written.
struct Memory<'a, H> {
    hypervisor: &'a H,
    domain: DomainId,
    frames: &'a [MachineFrame],
}

impl<H: Hypervisor> Builder for Memory<'_, H> {
    type Error = String;

    fn frame_of(&mut self, pfn: Pfn) -> Result<MachineFrame, String> {
        let frame = usize::try_from(pfn.0).ok().and_then(|index| self.frames.get(index));
        frame.copied().ok_or_else(|| format!("the domain has no page {:#x}", pfn.0))
    }

    fn write(&mut self, pfn: Pfn, offset: usize, bytes: &[u8]) -> Result<(), String> {
        let written = self.hypervisor.fill(self.domain, self.frames, pfn, offset, bytes);
        written.map_err(|error| format!("page {:#x}: {error}", pfn.0))
    }

    /// Does nothing, as frames of a new domain are zero: the hypervisor shows a domain nothing of another's (P10).
    fn zero(&mut self, _: Pfn, _: usize, _: usize) -> Result<(), String> {
        Ok(())
    }
}

/// Grants the ring pages to the backend, which thus needs no authority over the domain.
fn seed_grants<H: Hypervisor>(
    hypervisor: &H,
    domain: DomainId,
    backend: DomainId,
    (store, console): (MachineFrame, MachineFrame),
) -> Result<(), Failed> {
    let table = hypervisor.grant_table(domain).map_err(at(Step::SeedGrants))?;
    for (reference, page) in [(REF_CONSOLE, console), (REF_XENSTORE, store)] {
        let beyond = |_| Failed(Step::SeedGrants, format!("frame {:#x} is beyond what a grant can name", page.0));
        let frame = u32::try_from(page.0).map_err(beyond)?;
        let grant = Entry { flags: entry::PERMIT_ACCESS, domid: backend.0, frame };
        let offset = reference as usize * size_of::<Entry>();
        hypervisor.write(domain, table, offset, grant.as_bytes()).map_err(at(Step::SeedGrants))?;
    }
    Ok(())
}

/// The state of vcpu 0 at the first instruction (ABI core 1.5).
fn first_context(start: &Start) -> VcpuContext {
    let user_regs = UserRegs {
        rip: start.entry,
        rsp: start.stack,
        rsi: start.start_info,
        rflags: FIRST_RFLAGS,
        cs: selector::GUEST_CS,
        ss: u64::from(selector::GUEST_SS),
        ..UserRegs::default()
    };
    let mut context = VcpuContext {
        flags: flags::IN_KERNEL | flags::ONLINE,
        user_regs,
        kernel_ss: u64::from(selector::GUEST_SS),
        kernel_sp: start.stack,
        ..VcpuContext::default()
    };
    context.ctrlreg[0] = FIRST_CR0;
    context.ctrlreg[3] = start.root.address();
    context.debugreg[6] = 0xffff_0ff0;
    context.debugreg[7] = 0x400;
    context
}

impl Guest {
    /// Introduces the domain to the store, and lets it run. Its devices must have been added to the tree before.
    ///
    /// # Errors
    /// The step that failed and why. Before this error is returned, `remove_devices` is called, which must remove all that back
    /// ends have of the domain. Then the domain is destroyed; `pause` is called after every piece of that.
    pub async fn start<H: Hypervisor, S: Store>(
        self,
        hypervisor: &H,
        store: &S,
        remove_devices: impl AsyncFnOnce(),
        pause: impl AsyncFn(),
    ) -> Result<Self, CreateError> {
        let Ring { page, port } = self.store;
        let introduced = store.introduce(self.domain, page, port).map_err(at(Step::Introduce));
        match introduced.and_then(|()| hypervisor.unpause(self.domain).map_err(at(Step::Unpause))) {
            Ok(()) => Ok(self),
            Err(Failed(step, why)) => {
                let name = self.config.name.clone();
                remove_devices().await;
                Err(CreateError { name, step, why, left_over: self.destroy(hypervisor, store, pause).await })
            }
        }
    }

    /// Destroys the domain and removes what it has in the store; `pause` is called after every piece. Continues
    /// whatever fails; returns what could not be removed, and why.
    #[must_use = "what is left over should be told"]
    pub async fn destroy<H: Hypervisor, S: Store>(
        self,
        hypervisor: &H,
        store: &S,
        pause: impl AsyncFn(),
    ) -> Vec<String> {
        let mut left_over = Vec::new();
        let mut note = |what: String, error: Option<String>| {
            left_over.extend(error.map(|error| format!("{what}: {error}")));
        };
        // The store unmaps its page first, so that the domain's frames are free when the domain is gone.
        let released = store.release(self.domain);
        note(format!("store connection of domain {}", self.domain), released.err().map(|e| e.to_string()));
        let console = tree::console_back(self.domain, self.backend);
        for path in [tree::home(self.domain), tree::vm(&self.uuid), console] {
            let removed = store.remove(&path);
            note(path, removed.err().map(|e| e.to_string()));
        }
        let destroyed = end_domain(hypervisor, self.domain, pause).await;
        note(format!("domain {}", self.domain), destroyed.err().map(|e| e.to_string()));
        left_over
    }
}
