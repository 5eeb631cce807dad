//! A whole machine for the rules to run on: CPUs, memory, a clock that advances with the work done, and malice, which
//! changes guest memory between two looks of the rules.
//!
//! [`cpus`] has how CPUs flush and kick each other, [`memory`] the pages, [`state`] what a CPU has loaded, and [`devices`]
//! the clock and the console.

mod cpus;
mod devices;
mod memory;
mod state;

use super::turns::{self, At, Stand, Turns, this_cpu};
use crate::machine::Cached;
use crate::rng::Rng;
use hv_core::addr::{DomainId, ENTRIES, Frame, HOLE_START};
use hv_core::domain::Life;
use hv_core::fault::{self, Fault};
use hv_core::frame::FrameTable;
use hv_core::frame::asked::Asked;
use hv_core::machine::{Arrived, Entry, Exit, FIRST_MESSAGE, Interrupt, MESSAGES, Page, Registers, entry};
use hv_core::world::World;
pub use memory::Race;
pub(super) use memory::owner_number;
use std::collections::BTreeMap;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize};
use std::sync::{Mutex, MutexGuard, OnceLock};

/// Where a CPU sees its vcpu's GDT.
pub const GDT_WINDOW: u64 = HOLE_START + (4 << 39);
/// Where it sees its LDT.
pub const LDT_WINDOW: u64 = GDT_WINDOW + (16 << 12);
/// A time that does not come, though somebody may wait for it.
const NEVER: u64 = 1 << 62;

/// What the CPU has loaded.
#[derive(Clone, Debug)]
#[expect(missing_docs, reason = "the names are those of the registers")]
pub struct Loaded {
    pub root: Option<Frame>,
    pub fs_base: u64,
    pub gs_base: u64,
    pub task_switched: bool,
    pub cr4: u64,
    pub xcr0: u64,
    pub debug: [u64; 8],
    pub sysenter: bool,
    pub selectors: [u16; 4],
    pub gdt: [Option<Frame>; 14],
    pub ldt_entries: u32,
    pub ldt: [Option<Frame>; 16],
    pub tsc_aux: u32,
}

/// One CPU: what it has loaded, what it may remember, and what others want of it.
struct OneCpu {
    stand: Stand,
    loaded: Mutex<Loaded>,
    cached: Mutex<Vec<Cached>>,
    /// What its entry code goes by.
    entry: Entry,
    /// CR2.
    fault_address: AtomicU64,
    /// Complete flushes so far.
    flushes: AtomicU64,
    armed: AtomicU64,
    /// Looks at memory so far.
    work: AtomicU64,
    /// Looks at words of the frame table while it was its turn, and how many there were in all when the turn began.
    looks: [AtomicU64; 2],
    /// Who interferes with its guest's memory.
    race: Mutex<Option<Race>>,
    racing: AtomicBool,
    /// Selectors that do not load when a vcpu comes to it the next time.
    refused: Mutex<Option<[u16; 4]>>,
    /// A key was typed, and its interrupt waits.
    typed: AtomicBool,
    /// Messages of devices on their way, a bit for each vector.
    sent: [AtomicU64; MESSAGES.div_ceil(64)],
    /// They wait.
    held: AtomicBool,
    /// A kick is on its way.
    kicked: AtomicBool,
    /// Another CPU wants it to flush.
    asked: Asked,
    /// So completely.
    asked_all: AtomicBool,
}

/// Memory, CPUs, a clock.
pub struct WholeMachine {
    pages: Vec<Box<Page>>,
    m2p: Vec<AtomicU64>,
    touched: Vec<AtomicBool>,
    words: Mutex<Vec<Vec<(usize, u64)>>>,
    clock: AtomicU64,
    cpus: Vec<OneCpu>,
    /// What a story says that another CPU does while one waits until all have flushed.
    meanwhile: Mutex<Option<Box<dyn FnOnce() + Send>>>,
    turns: Turns,
    /// What decides whose turn it is, and what comes late.
    pub(super) rng: Mutex<Rng>,
    /// What the rules keep, where several CPUs look at it.
    world: OnceLock<&'static World>,
    /// The highest limit that each domain has had since the last audit.
    limits: Mutex<BTreeMap<DomainId, u64>>,
    /// Nobody waits until others have flushed: a fault of the machine.
    pub impatient: AtomicBool,
    /// Work takes no time.
    pub steady: AtomicBool,
    /// What was written to the ports of PCI configuration: port, size, value.
    pub configured: Mutex<Vec<(u16, u8, u32)>>,
    /// How many bytes the console takes at once.
    pub line: AtomicUsize,
    /// What it took first.
    pub printed: Mutex<Vec<u8>>,
    /// What ring 0 has logged.
    pub logged: Mutex<Vec<u8>>,
    /// What CPUID answers: EAX, EBX, ECX, EDX of a leaf and subleaf.
    pub cpuid: Mutex<fn(u32, u32) -> [u32; 4]>,
}

/// A CPU with every feature, up to AVX.
fn a_full_cpu(leaf: u32, subleaf: u32) -> [u32; 4] {
    match (leaf, subleaf) {
        (0, _) => [0x16, 0x756e_6547, 0x6c65_746e, 0x4965_6e69],
        (0xd, 0) => [7, 832, 832, 0],
        (0xd, 2) => [256, 576, 0, 0],
        (0x8000_0000, _) => [0x8000_0008, 0, 0, 0],
        _ => [u32::MAX; 4],
    }
}

/// What a rule is told of an interrupt that came while its CPU slept.
#[must_use]
pub fn arrived(interrupt: Interrupt) -> Arrived {
    let mut arrived = Arrived { console: interrupt == Interrupt::Console, ..Arrived::default() };
    if let Interrupt::Message(vector) = interrupt {
        note_message(&mut arrived, vector);
    }
    arrived
}

fn note_message(arrived: &mut Arrived, vector: u8) {
    let number = usize::from(vector - FIRST_MESSAGE);
    arrived.messages[number / 64] |= 1 << (number % 64);
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

impl WholeMachine {
    /// A machine of so many frames, all zero, and one CPU.
    #[must_use]
    pub fn new(frames: usize) -> Self {
        Self::with_cpus(frames, 1, 0)
    }

    /// A machine of so many frames, all zero, and so many CPUs, whose turns the seed decides.
    #[must_use]
    pub fn with_cpus(frames: usize, cpus: usize, seed: u64) -> Self {
        turns::prepare();
        Self {
            pages: (0..frames).map(|_| Box::new([const { AtomicU64::new(0) }; ENTRIES])).collect(),
            m2p: (0..frames).map(|_| AtomicU64::new(u64::MAX)).collect(),
            touched: (0..frames).map(|_| AtomicBool::new(true)).collect(),
            words: Mutex::new(vec![Vec::new(); frames]),
            clock: AtomicU64::new(1),
            cpus: (0..cpus).map(|_| OneCpu::new()).collect(),
            meanwhile: Mutex::default(),
            turns: Turns::new(),
            rng: Mutex::new(Rng::new(seed ^ 0x5eed)),
            world: OnceLock::new(),
            limits: Mutex::default(),
            impatient: AtomicBool::new(false),
            steady: AtomicBool::new(false),
            configured: Mutex::default(),
            line: AtomicUsize::new(usize::MAX),
            printed: Mutex::default(),
            logged: Mutex::new(b"[info] Tenon\n".to_vec()),
            cpuid: Mutex::new(a_full_cpu),
        }
    }

    /// A machine of two CPUs for a story, which says what each does.
    #[must_use]
    pub fn for_two(frames: usize) -> Self {
        let mut it = Self::with_cpus(frames, 2, 0);
        it.cpus.iter_mut().for_each(|cpu| cpu.stand = Stand::told());
        it
    }

    /// While this CPU waits for the next flush, when all have done it, or when it has answered that it has flushed, another
    /// does something.
    pub fn meanwhile(&self, work: impl FnOnce() + Send + 'static) {
        *lock(&self.meanwhile) = Some(Box::new(work));
    }

    /// Whether that has yet to be done.
    #[must_use]
    pub fn has_meanwhile(&self) -> bool {
        lock(&self.meanwhile).is_some()
    }

    /// How many CPUs it has.
    #[must_use]
    pub fn cpu_count(&self) -> usize {
        self.cpus.len()
    }

    /// The CPU this thread plays.
    fn here(&self) -> &OneCpu {
        &self.cpus[this_cpu()]
    }

    pub(super) fn turns(&self) -> &Turns {
        &self.turns
    }

    pub(super) fn stand(&self, cpu: usize) -> &Stand {
        &self.cpus[cpu].stand
    }

    /// Says at which world the CPUs look: looks are counted for each CPU then.
    pub fn looks_at(&self, world: &'static World) {
        let first = self.world.set(world).is_ok();
        assert!(first, "one world");
    }

    /// Notes how many frames each domain may own now.
    pub fn note_limits(&self, world: &World) {
        let _outside = turns::outside();
        let mut limits = lock(&self.limits);
        for domain in world.domains.iter().filter(|domain| domain.life() != Life::Free) {
            let highest = limits.entry(domain.id()).or_default();
            *highest = domain.max_pages.load(Relaxed).max(*highest);
        }
    }

    /// The highest limit of a domain that has been noted.
    #[must_use]
    pub fn highest_limit(&self, id: DomainId) -> u64 {
        lock(&self.limits).get(&id).copied().unwrap_or_default()
    }

    /// From here on the limits of now count, unless a CPU waits that may go by an older one.
    pub fn forget_limits(&self, world: &World) {
        if !self.somebody_waits() {
            lock(&self.limits).clear();
        }
        self.note_limits(world);
    }

    /// One look in so many gives other CPUs a chance.
    pub fn set_odds(&self, odds: u64) {
        self.turns.odds.store(odds, Relaxed);
    }

    /// This CPU's turn ends: its looks are counted, and others can go by the limits of now.
    pub(super) fn rests(&self) {
        if let Some(world) = self.world.get() {
            let [sum, since] = &self.here().looks;
            sum.store(sum.load(Relaxed) + world.frames.looks() - since.load(Relaxed), Relaxed);
            self.note_limits(world);
        }
    }

    /// It is this CPU's turn again.
    pub(super) fn goes_on(&self) {
        if let Some(world) = self.world.get() {
            self.here().looks[1].store(world.frames.looks(), Relaxed);
        }
    }

    /// Looks of this CPU at memory so far, and at words of the frame table.
    pub fn work_with(&self, frames: &FrameTable) -> u64 {
        let [sum, since] = &self.here().looks;
        self.here().work.load(Relaxed) + sum.load(Relaxed) + frames.looks() - since.load(Relaxed)
    }

    /// Does something that costs no work: an audit.
    pub fn for_free<R>(&self, work: impl FnOnce() -> R) -> R {
        let (before, race) = (self.here().work.load(Relaxed), self.set_race(None));
        let result = work();
        self.here().work.store(before, Relaxed);
        self.set_race(race);
        result
    }

    /// What the CPU has loaded.
    pub fn loaded(&self) -> MutexGuard<'_, Loaded> {
        lock(&self.here().loaded)
    }

    /// Translations that CPUs may remember.
    #[must_use]
    pub fn cached(&self) -> Vec<Cached> {
        self.cpus.iter().flat_map(|cpu| lock(&cpu.cached).clone()).collect()
    }

    /// A key is typed, whose interrupt this CPU gets.
    pub fn type_key(&self) {
        self.here().typed.store(true, Relaxed);
    }

    /// Whether the interrupt of a key waits for this CPU.
    #[must_use]
    pub fn has_typed(&self) -> bool {
        self.here().typed.load(Relaxed)
    }

    /// Takes the interrupt of a key, if it waits.
    pub fn take_typed(&self) -> bool {
        self.here().typed.swap(false, Relaxed)
    }

    /// A device sends this CPU a message, if the vector is one that messages may have.
    pub fn send_message(&self, vector: u8) {
        let number = usize::from(vector.wrapping_sub(FIRST_MESSAGE));
        if let Some(sent) = self.here().sent.get(number / 64) {
            sent.fetch_or(1 << (number % 64), Relaxed);
        }
    }

    /// Takes the first message that has come, unless they wait.
    pub fn take_message(&self) -> Option<u8> {
        let here = self.here();
        let came = |word: &AtomicU64| word.load(Relaxed);
        if here.held.load(Relaxed) {
            return None;
        }
        let (first, word) = (FIRST_MESSAGE..).step_by(64).zip(&here.sent).find(|(_, word)| came(word) != 0)?;
        let bit = came(word).trailing_zeros();
        word.fetch_and(!(1 << bit), Relaxed);
        Some(first + bit as u8)
    }

    /// Takes all interrupts that somebody waits for.
    fn take_arrived(&self) -> Arrived {
        let mut arrived = Arrived { console: self.take_typed(), ..Arrived::default() };
        while let Some(vector) = self.take_message() {
            note_message(&mut arrived, vector);
        }
        arrived
    }

    /// Whether messages wait because there were too many.
    #[must_use]
    pub fn holds_messages(&self) -> bool {
        self.here().held.load(Relaxed)
    }

    /// Whether a kick is on its way to a CPU.
    #[must_use]
    pub fn is_kicked(&self, cpu: usize) -> bool {
        self.cpus[cpu].kicked.load(Relaxed)
    }

    /// Takes a kick that has been sent to this CPU, unless it comes later.
    pub fn take_kick(&self) -> bool {
        self.here().kicked.load(Relaxed) && self.dice(|rng| rng.one_in(2)) && self.here().kicked.swap(false, Relaxed)
    }

    /// The selectors of the vcpu that comes to this CPU next do not load.
    pub fn refuse(&self, selectors: [u16; 4]) {
        *lock(&self.here().refused) = Some(selectors);
    }

    /// Whether somebody has something for a CPU that sleeps.
    pub(super) fn wakes(&self, cpu: usize) -> bool {
        let it = &self.cpus[cpu];
        let due = it.armed.load(Relaxed) <= self.clock.load(Relaxed);
        due || it.kicked.load(Relaxed) || it.typed.load(Relaxed) || self.is_stopped()
    }

    /// A CPU does what others have asked it for.
    pub(super) fn answer(&self, cpu: usize) {
        let it = &self.cpus[cpu];
        if !it.asked.is_pending() {
            return;
        }
        it.asked.answer(|| {
            if it.asked_all.swap(false, SeqCst) {
                it.flushes.fetch_add(1, Relaxed);
                lock(&it.cached).clear();
            }
        });
        self.progressed();
    }

    /// Whether this CPU is asked to flush.
    #[must_use]
    pub fn is_asked(&self) -> bool {
        self.here().asked.is_pending()
    }

    /// What the entry code leaves of an exit: the error word, and CR2.
    pub fn keep_exit(&self, regs: &mut Registers, exit: Exit) {
        let (kind, error, address) = match exit {
            Exit::Syscall => (entry::SYSCALL, 0, 0),
            Exit::Syscall32 => (entry::SYSCALL32, 0, 0),
            Exit::Sysenter => (entry::SYSENTER, 0, 0),
            Exit::Fault { vector, error, address } => (vector.into(), error, address),
            Exit::ReturnFault { vector, error, address } => (entry::FAILED_RETURN + u32::from(vector), error, address),
            Exit::Interrupt(_) => (0xf0, 0, 0),
        };
        regs.error = u64::from(kind) << 32 | u64::from(error);
        self.here().fault_address.store(address, Relaxed);
    }

    /// This CPU is about to run its guest, or does: it answers what it was asked.
    pub fn answer_here(&self) {
        let asked = self.is_asked();
        self.answer(this_cpu());
        if asked {
            self.another_goes_on();
        }
    }

    /// [`hv_core::machine::Machine::begin`] answers nothing: a fault of the machine, after which it does so here.
    pub fn answer_late(&self) {
        if fault::is_planted(Fault::ArmThenAnswer) {
            self.answer_here();
        }
    }

    /// Another CPU asks a CPU to flush, and waits for the answer.
    pub fn ask(&self, cpu: usize) {
        self.cpus[cpu].asked_all.store(true, SeqCst);
        self.cpus[cpu].asked.ask();
    }

    fn another_goes_on(&self) {
        let meanwhile = lock(&self.meanwhile).take();
        if let Some(work) = meanwhile {
            work();
        }
    }

    /// The time, which does not advance by this look.
    #[must_use]
    pub fn time(&self) -> u64 {
        self.clock.load(Relaxed)
    }

    /// Lets time pass.
    pub fn pass(&self, nanoseconds: u64) {
        self.clock.store(self.clock.load(Relaxed) + nanoseconds, Relaxed);
    }

    /// When the timer of this CPU fires.
    #[must_use]
    pub fn armed(&self) -> u64 {
        self.here().armed.load(Relaxed)
    }

    /// When the timer of a CPU fires.
    #[must_use]
    pub fn armed_at(&self, cpu: usize) -> u64 {
        self.cpus[cpu].armed.load(Relaxed)
    }

    /// Whether the timer of this CPU has fired.
    #[must_use]
    pub fn is_due(&self) -> bool {
        self.armed() <= self.clock.load(Relaxed)
    }

    /// The guest has stepped to an address, and the CPU says so in DR6, with the breakpoints whose addresses it finds there:
    /// all of them, whether they are on or not.
    pub fn single_step(&self, to: u64) {
        let mut cpu = self.loaded();
        let met = (0..4).filter(|&n| cpu.debug[n] == to).fold(0, |bits, n| bits | 1 << n);
        cpu.debug[6] |= 1 << 14 | met;
    }

    /// Sleeps until an interrupt comes; `None` if none ever will, because no CPU has anything to do.
    pub fn idle(&self) -> Option<Interrupt> {
        loop {
            self.answer_here();
            if self.take_typed() {
                return Some(Interrupt::Console);
            }
            if let Some(vector) = self.take_message() {
                return Some(Interrupt::Message(vector));
            }
            if self.is_due() {
                return Some(Interrupt::Timer);
            }
            if self.take_kick() {
                return Some(Interrupt::Kick);
            }
            if self.is_stopped() {
                return Some(Interrupt::Other);
            }
            if self.hand_on(At::Asleep) || self.wakes(this_cpu()) {
                continue;
            }
            // All sleep, and nobody has anything for anybody: time passes.
            match self.cpus.iter().map(|cpu| cpu.armed.load(Relaxed)).min() {
                None | Some(NEVER..) => return None,
                Some(deadline) => _ = self.clock.fetch_max(deadline, Relaxed),
            }
        }
    }
}

impl hv_core::machine::Machine for WholeMachine {
    fn begin(&self, _: &mut Registers) {
        if !fault::is_planted(Fault::ArmThenAnswer) {
            self.answer_here();
        }
    }
    fn let_in(&self) -> Arrived {
        self.answer_here();
        self.take_kick();
        self.take_arrived()
    }
}
