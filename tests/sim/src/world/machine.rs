//! A whole machine for the rules to run on: CPUs, memory, a clock that advances with the work done, and malice, which
//! changes guest memory between two looks of the rules.

use super::turns::{self, At, Stand, Turns, this_cpu};
use crate::machine::{Cached, HOLE_MARK, Seen};
use crate::rng::Rng;
use hv_core::addr::{CpuId, CpuSet, DomainId, ENTRIES, Frame, GuestVirt, HOLE_SLOTS, HOLE_START, PAGE_SIZE};
use hv_core::domain::Life;
use hv_core::fault::{self, Fault};
use hv_core::frame::asked::Asked;
use hv_core::frame::{FrameTable, Owner, Use};
use hv_core::machine::{
    Clock, Console, CpuState, Cpus, Entry, Exit, Flush, Frames, Interrupt, Page, Registers, Segments, entry,
};
use hv_core::vcpu::debug::DR6_CLEAR;
use hv_core::world::World;
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
/// What one look at a word costs.
const WORD_NS: u64 = 5;

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

/// Changes guest memory while the rules look at it, as another CPU of the guest could.
pub struct Race {
    /// The words of all frames: only what a guest can write is changed.
    pub frames: &'static FrameTable,
    /// Which frames.
    pub over: Vec<Frame>,
    /// How, and how often: one look in so many.
    pub rng: Rng,
    /// One look in so many.
    pub odds: usize,
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

    /// While this CPU waits for the next flush, when all have done it, or when it has answered that it has flushed, another does
    /// something.
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

    /// Lets somebody interfere from now on with what this CPU looks at, or nobody; gives back who did.
    pub fn set_race(&self, race: Option<Race>) -> Option<Race> {
        self.here().racing.store(race.is_some(), Relaxed);
        std::mem::replace(&mut lock(&self.here().race), race)
    }

    fn looked(&self, frame: Frame, words: u64) {
        turns::between();
        let work = &self.here().work;
        work.store(work.load(Relaxed) + words, Relaxed); // one thread at a time
        self.pass(if self.steady.load(Relaxed) { 0 } else { words * WORD_NS });
        self.touched[frame.index()].store(true, Relaxed);
    }

    /// Changes a word of a frame a guest can write, if the dice say so.
    fn interfere(&self, frame: Frame) {
        if !self.here().racing.load(Relaxed) {
            return;
        }
        let mut race = lock(&self.here().race);
        let Some(race) = race.as_mut() else { return };
        if !race.rng.one_in(race.odds) || !race.over.contains(&frame) {
            return;
        }
        if race.frames.info(frame).is_some_and(|i| i.kind.used_as == Use::Writable && i.kind.count > 0) {
            let at = race.rng.below(ENTRIES);
            let old = self.pages[frame.index()][at].load(Relaxed);
            let new = match race.rng.below(4) {
                0 => 0,
                1 => u64::MAX,
                2 => old ^ 1 << race.rng.below(64),
                _ => race.rng.word(),
            };
            self.pages[frame.index()][at].store(new, Relaxed);
        }
    }

    /// The rules write bytes to memory that is somebody's, and no table.
    fn must_be_memory(&self, frame: Frame) {
        let Some(info) = self.world.get().and_then(|world| world.frames.info(frame)) else { return };
        let table = info.kind.live_table();
        assert!(table.is_none(), "P1: {frame:?} is written, and is a table of level {table:?}");
        assert!(info.owner.owner != Owner::Free, "P4: {frame:?} is written, and is nobody's");
    }

    /// Calls a look at the words of a frame that are not zero.
    pub fn words<R>(&self, frame: Frame, look: impl FnOnce(&[(usize, u64)]) -> R) -> R {
        let at = frame.index();
        let mut words = lock(&self.words);
        if self.touched[at].swap(false, Relaxed) {
            let list = &mut words[at];
            list.clear();
            list.extend(self.pages[at].iter().map(|w| w.load(Relaxed)).enumerate().filter(|&(_, w)| w != 0));
        }
        look(&words[at])
    }

    /// A word as it is, without a look of the rules.
    #[must_use]
    pub fn peek(&self, frame: Frame, at: usize) -> u64 {
        self.pages[frame.index()][at].load(Relaxed)
    }

    /// The guest changes a word of its memory.
    pub fn poke(&self, frame: Frame, at: usize, value: u64) {
        self.touched[frame.index()].store(true, Relaxed);
        self.pages[frame.index()][at].store(value, Relaxed);
    }

    /// Walks from the loaded root, or from a table it remembers, through random present entries, as the CPU does for a guest:
    /// remembers what it saw, sets accessed bits, and the dirty bit for a write. `frames` says whose each frame is.
    pub fn wander(&self, frames: &FrameTable, rng: &mut Rng) {
        let Some(root) = self.loaded().root else { return };
        let level_of = |c: &Cached| if let Seen::Table(level) = c.seen { Some((c.frame, level)) } else { None };
        let tables: Vec<(Frame, u8)> = lock(&self.here().cached).iter().filter_map(level_of).collect();
        let remembered = if self.cpu_count() > 1 && rng.one_in(3) { rng.pick(&tables) } else { None };
        let (mut table, first) = remembered.unwrap_or((root, 4));
        let mut writable = true;
        for level in (1..=first).rev() {
            self.remember(frames, table, Seen::Table(level));
            let live = |&(at, word): &(usize, u64)| word & 1 != 0 && !(level == 4 && HOLE_SLOTS.contains(&at));
            let candidates: Vec<usize> =
                self.words(table, |words| words.iter().filter(|w| live(w)).map(|w| w.0).collect());
            let Some(mut at) = rng.pick(&candidates) else { return };
            // Pages that become tables and pages again are looked at most.
            if level == 1 && self.cpu_count() > 1 && rng.one_in(2) {
                at = rng.pick(&[5, 6, 7, 8]).filter(|at| candidates.contains(at)).unwrap_or(at);
            }
            let old = self.peek(table, at);
            self.poke(table, at, old | 1 << 5 | if level == 1 && old & 2 != 0 { 1 << 6 } else { 0 });
            writable &= old & 2 != 0;
            let Some(next) = Frame::containing(old & 0x000f_ffff_ffff_f000) else { return };
            if next.index() >= self.pages.len() {
                return;
            }
            table = next;
        }
        self.remember(frames, table, Seen::Page { writable });
    }

    /// This CPU remembers that it took a frame for something.
    pub fn remember(&self, frames: &FrameTable, frame: Frame, seen: Seen) {
        let turn = owner_number(frames, frame);
        let what = Cached { cpu: CpuId(this_cpu() as u32), frame, turn, seen };
        let mut cached = lock(&self.here().cached);
        if !cached.contains(&what) {
            cached.push(what);
        }
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

impl OneCpu {
    fn new() -> Self {
        let loaded = Loaded {
            root: None,
            fs_base: 0,
            gs_base: 0,
            task_switched: false,
            cr4: 0,
            xcr0: 1,
            debug: [0, 0, 0, 0, 0, 0, DR6_CLEAR, 0x400],
            sysenter: false,
            selectors: [0; 4],
            gdt: [None; 14],
            ldt_entries: 0,
            ldt: [None; 16],
            tsc_aux: 0,
        };
        Self {
            stand: Stand::new(),
            loaded: Mutex::new(loaded),
            cached: Mutex::default(),
            entry: Entry::new(),
            fault_address: AtomicU64::new(0),
            flushes: AtomicU64::new(0),
            armed: AtomicU64::new(u64::MAX),
            work: AtomicU64::new(0),
            looks: [const { AtomicU64::new(0) }; 2],
            race: Mutex::new(None),
            racing: AtomicBool::new(false),
            refused: Mutex::new(None),
            typed: AtomicBool::new(false),
            kicked: AtomicBool::new(false),
            asked: Asked::new(),
            asked_all: AtomicBool::new(false),
        }
    }
}

/// Whose a frame is, as a number; 0 if it is nobody's, so that no harm comes of remembering it.
pub(super) fn owner_number(frames: &FrameTable, frame: Frame) -> u32 {
    match frames.info(frame).map(|info| info.owner.owner) {
        Some(Owner::Guest(id)) => 1 << 16 | u32::from(id.0),
        Some(Owner::Lent(id)) => 2 << 16 | u32::from(id.0),
        Some(Owner::Hypervisor) => 3 << 16,
        _ => 0,
    }
}

impl WholeMachine {
    /// The entry of the machine-to-physical table for a frame.
    #[must_use]
    pub fn m2p(&self, frame: Frame) -> u64 {
        self.m2p[frame.index()].load(Relaxed)
    }
}

impl Frames for WholeMachine {
    fn frame_limit(&self) -> u64 {
        self.pages.len() as u64
    }
    fn page(&self, frame: Frame) -> &Page {
        self.interfere(frame);
        self.looked(frame, 1);
        &self.pages[frame.index()]
    }
    fn read(&self, frame: Frame, offset: usize, to: &mut [u8]) {
        assert!(offset + to.len() <= PAGE_SIZE, "a read beyond the frame");
        self.looked(frame, 1 + to.len() as u64 / 8);
        let page = &self.pages[frame.index()];
        for (n, byte) in to.iter_mut().enumerate() {
            let at = offset + n;
            *byte = page[at / 8].load(Relaxed).to_le_bytes()[at % 8];
        }
        self.interfere(frame);
    }
    fn write(&self, frame: Frame, offset: usize, from: &[u8]) {
        assert!(offset + from.len() <= PAGE_SIZE, "a write beyond the frame");
        self.must_be_memory(frame);
        self.looked(frame, 1 + from.len() as u64 / 8);
        let page = &self.pages[frame.index()];
        for (n, byte) in from.iter().enumerate() {
            let at = offset + n;
            let mut bytes = page[at / 8].load(Relaxed).to_le_bytes();
            bytes[at % 8] = *byte;
            page[at / 8].store(u64::from_le_bytes(bytes), Relaxed);
        }
    }
    fn zero(&self, frame: Frame) {
        self.looked(frame, 64); // whole lines
        self.pages[frame.index()].iter().for_each(|word| word.store(0, Relaxed));
    }
    fn copy(&self, from: Frame, to: Frame) {
        self.looked(to, 128);
        for (a, b) in self.pages[from.index()].iter().zip(self.pages[to.index()].iter()) {
            b.store(a.load(Relaxed), Relaxed);
        }
    }
    fn set_m2p(&self, frame: Frame, pfn: u64) {
        self.m2p[frame.index()].store(pfn, Relaxed);
    }
    fn direct(&self, frame: Frame) -> u64 {
        frame.address()
    }
    fn hole_entry(&self, index: usize) -> u64 {
        HOLE_MARK | index as u64
    }
}

impl Cpus for WholeMachine {
    fn this_cpu(&self) -> CpuId {
        CpuId(this_cpu() as u32)
    }
    fn flush(&self, cpus: CpuSet, what: Flush) {
        let me = this_cpu();
        let others = || (0..self.cpus.len()).filter(|cpu| *cpu != me && cpus.has(CpuId(*cpu as u32)));
        for cpu in others() {
            let it = &self.cpus[cpu];
            // A flush of one page may be taken for none: the rules must not rely on it for P4.
            it.asked_all.fetch_or(what == Flush::All, SeqCst);
            it.asked.ask();
        }
        self.progressed(); // they have something to answer
        if what == Flush::All && cpus.has(self.this_cpu()) {
            self.here().flushes.fetch_add(1, Relaxed);
            lock(&self.here().cached).clear();
        }
        for cpu in others() {
            let asked = &self.cpus[cpu].asked;
            let requests = asked.so_far();
            while !asked.has_answered(requests) && !self.impatient.load(Relaxed) {
                if self.may_be_answered_for(cpu) {
                    self.answer(cpu);
                } else {
                    self.answer(me);
                    self.hold_on();
                }
            }
        }
        self.another_goes_on();
    }
    fn flushes(&self) -> u64 {
        self.here().flushes.load(Relaxed)
    }
    fn forget(&self) {
        self.here().flushes.fetch_add(1, Relaxed);
    }
    fn kick(&self, cpu: CpuId) {
        assert_ne!(cpu, self.this_cpu(), "nobody kicks the CPU it is on");
        self.cpus[cpu.0 as usize].kicked.store(true, Relaxed);
    }
}

impl Clock for WholeMachine {
    fn now(&self) -> u64 {
        self.clock.fetch_add(if self.steady.load(Relaxed) { 0 } else { 20 }, Relaxed)
    }
    fn arm(&self, deadline: u64) {
        self.here().armed.store(deadline, Relaxed);
    }
    fn tsc(&self) -> u64 {
        self.clock.load(Relaxed).wrapping_mul(3)
    }
    fn tsc_khz(&self) -> u64 {
        3_000_000
    }
    fn tsc_origin(&self) -> u64 {
        0
    }
    fn wallclock(&self) -> (u64, u32) {
        (1_800_000_000, 5)
    }
}

impl Console for WholeMachine {
    fn put(&self, bytes: &[u8]) -> usize {
        let taken = bytes.len().min(self.line.load(Relaxed));
        let mut printed = lock(&self.printed);
        if printed.len() < 1 << 16 {
            printed.extend(&bytes[..taken]);
        }
        taken
    }
    fn take(&self, to: &mut [u8]) -> usize {
        let some = to.len().min(3);
        to[..some].fill(b'x');
        some
    }
    fn kept(&self, from: u32, to: &mut [u8]) -> std::ops::Range<u32> {
        let log = lock(&self.logged);
        let rest = log.get(from as usize..).unwrap_or_default();
        let count = rest.len().min(to.len());
        to[..count].copy_from_slice(&rest[..count]);
        let from = (log.len() - rest.len()) as u32;
        from..from + count as u32
    }
}

fn canonical(address: u64) {
    assert!(GuestVirt(address).is_canonical(), "P12: a base of {address:#x}");
}

impl CpuState for WholeMachine {
    fn load_root(&self, root: Frame) {
        lock(&self.here().cached).clear();
        self.loaded().root = Some(root);
    }
    fn leave_root(&self) {
        lock(&self.here().cached).clear();
        self.loaded().root = None;
    }
    fn fs_base(&self) -> u64 {
        self.loaded().fs_base
    }
    fn set_fs_base(&self, base: u64) {
        canonical(base);
        self.loaded().fs_base = base;
    }
    fn entry(&self) -> &Entry {
        &self.here().entry
    }
    fn record_head(&self) -> u64 {
        let head = self.entry().info.load(Relaxed);
        Frame::containing(head).map_or(0, |frame| self.peek(frame, (head % 4096 / 8) as usize))
    }
    fn has_gs_instructions(&self) -> bool {
        self.loaded().cr4 >> 16 & 1 != 0
    }
    fn fault_address(&self) -> u64 {
        self.here().fault_address.load(Relaxed)
    }
    fn gs_base(&self) -> u64 {
        self.loaded().gs_base
    }
    fn set_gs_base(&self, base: u64) {
        canonical(base);
        self.loaded().gs_base = base;
    }
    fn load_gs(&self, selector: u16) -> Option<u64> {
        // Selectors below 0x40 load, as if their descriptors were good.
        (selector < 0x40).then_some(u64::from(selector) << 12)
    }
    fn data_selectors(&self) -> [u16; 4] {
        self.loaded().selectors
    }
    fn set_task_switched(&self, on: bool) {
        self.loaded().task_switched = on;
    }
    fn set_guest_cr4(&self, bits: u64) {
        self.loaded().cr4 = bits;
    }
    fn set_xcr0(&self, value: u64) {
        assert!(value & 1 == 1 && value & !7 == 0 && value != 5, "XCR0 of {value:#x} would fault");
        self.loaded().xcr0 = value;
    }
    fn set_breakpoints(&self, addresses: [u64; 4]) {
        for address in addresses {
            assert!(GuestVirt(address).is_guests(), "XSA-444: a breakpoint at {address:#x}");
        }
        self.loaded().debug[..4].copy_from_slice(&addresses);
    }
    fn set_debug_control(&self, dr7: u64) {
        assert!(dr7 & 0xffff_ffff_0000_f800 == 0 && dr7 & 0x400 != 0, "DR7 of {dr7:#x}");
        let ports = (0..4).filter(|n| dr7 >> (2 * n) & 3 != 0 && dr7 >> (16 + 4 * n) & 3 == 2);
        assert_eq!(ports.count(), 0, "a breakpoint on ring 0's ports: {dr7:#x}");
        self.loaded().debug[7] = dr7;
    }
    fn take_debug_status(&self) -> u64 {
        std::mem::replace(&mut self.loaded().debug[6], DR6_CLEAR)
    }
    fn allow_sysenter(&self, on: bool) {
        self.loaded().sysenter = on;
    }
    fn load_gdt(&self, frames: &[Option<Frame>]) {
        let mut gdt = [None; 14];
        gdt[..frames.len()].copy_from_slice(frames);
        self.loaded().gdt = gdt;
    }
    fn load_ldt(&self, entries: u32) {
        assert!(entries <= 8192);
        let mut cpu = self.loaded();
        (cpu.ldt_entries, cpu.ldt) = (entries, [None; 16]);
    }
    fn map_ldt(&self, page: u8, frame: Frame) {
        self.loaded().ldt[usize::from(page)] = Some(frame);
    }
    fn ldt_offset(&self, address: u64) -> Option<u32> {
        (LDT_WINDOW..LDT_WINDOW + (16 << 12)).contains(&address).then(|| (address - LDT_WINDOW) as u32)
    }
    fn gdt_offset(&self, address: u64) -> Option<u32> {
        (GDT_WINDOW..GDT_WINDOW + (16 << 12)).contains(&address).then(|| (address - GDT_WINDOW) as u32)
    }
    fn reset_fpu(&self, fpu: Frame) {
        self.zero(fpu);
    }
    fn switch_in(&self, segments: &Segments, _: Frame) -> Result<(), [u16; 4]> {
        self.set_fs_base(segments.fs_base);
        self.set_gs_base(segments.gs_base);
        self.entry().other_gs.store(segments.other_gs, Relaxed);
        lock(&self.here().refused).take().map_or(Ok(()), Err)
    }
    fn switch_out(&self, segments: &mut Segments, _: Frame) {
        (segments.fs_base, segments.gs_base) = (self.fs_base(), self.gs_base());
        segments.other_gs = self.entry().other_gs.load(Relaxed);
    }
    fn cpuid(&self, leaf: u32, subleaf: u32) -> [u32; 4] {
        lock(&self.cpuid)(leaf, subleaf)
    }
    fn set_tsc_aux(&self, value: u32) {
        self.loaded().tsc_aux = value;
    }
}

impl hv_core::machine::Machine for WholeMachine {
    fn begin(&self, _: &mut Registers) {
        if !fault::is_planted(Fault::ArmThenAnswer) {
            self.answer_here();
        }
    }
    fn let_in(&self) -> bool {
        self.answer_here();
        self.take_kick();
        self.take_typed()
    }
}
