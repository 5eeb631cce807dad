//! What is asked at the prompt, or by `--exec`: each verb, carried out.

use alloc::format;
use alloc::rc::Rc;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use hypercall_abi::domctl::DomainInfo;
use toolstack::bundle::ANSWER;
use toolstack::command::{Command, Line, help};
use toolstack::config::{GuestConfig, check_name};
use toolstack::create::Guest;
use toolstack::end::Wish;
use toolstack::json::{self, Object};
use toolstack::status::Failure;
use toolstack::{DomainId, Hypervisor, Summary, domains, states};
use unikernel::mark::{self, DESTROY, LISTED};
use unikernel::memory;
use unikernel::{hypercall, time};

use crate::guests::{Entry, Guests, OWN_BYTES, Past, State, guest_bytes};
use crate::terminal::Terminal;

/// How often a command that waits looks again.
const LOOK_NS: u64 = 50_000_000;

/// What a command came to.
pub(crate) enum Done {
    /// It is over.
    Well,
    /// It was refused, and this has been said.
    Badly,
    /// It is over when this is.
    Waits(Wait),
}

/// The end of a guest that was asked to end.
pub(crate) struct Wait {
    name: String,
    domain: DomainId,
    wish: Wish,
}

/// An answer for a person, and for a program.
struct Answer {
    text: String,
    json: String,
}

impl Answer {
    /// Nothing to tell a person but that it is done: no text.
    fn done(verb: &str, name: &str) -> Self {
        Self { text: String::new(), json: Object::default().text("done", verb).text("name", name).end() }
    }
}

impl Entry {
    /// Whether it lives, or soon will.
    pub(crate) fn is_alive(&self) -> bool {
        matches!(self.state, State::Lives(_) | State::Waits(_) | State::Planned | State::Begun)
    }

    /// The domain, if there is one.
    fn guest(&self) -> Option<&Guest> {
        match &self.state {
            State::Lives(guest) | State::Kept(guest) => Some(guest),
            State::Planned | State::Begun | State::Waits(_) | State::Ended => None,
        }
    }

    fn guest_mut(&mut self) -> Option<&mut Guest> {
        match &mut self.state {
            State::Lives(guest) | State::Kept(guest) => Some(guest),
            State::Planned | State::Begun | State::Waits(_) | State::Ended => None,
        }
    }
}

/// A guest that has ended, in a list.
impl Entry {
    fn epitaph(&self) -> String {
        let GuestConfig { name, memory, vcpus, .. } = &self.config;
        let line = format!("{name:<20} {:>5} {memory:>8} {vcpus:>5} {:<5} {:>9}", "-", "ended", "-");
        let Some(Past { domain, how, at, .. }) = &self.past else { return line };
        let domain = domain.map_or_else(String::new, |domain| format!(" as domain {domain}"));
        format!("{line}  {how} at {}{domain}", clock(at / 1_000_000_000))
    }

    fn epitaph_json(&self) -> String {
        let GuestConfig { name, memory, vcpus, .. } = &self.config;
        let object = Object::default().text("name", name).raw("domid", "null").raw("memory_mib", memory);
        let object = object.raw("vcpus", vcpus).text("state", "ended").raw("seconds", "null");
        let Some(Past { domain, how, at, report, refused }) = &self.past else { return object.end() };
        let domain = domain.map_or_else(|| "null".to_string(), |domain| domain.to_string());
        let past = Object::default().text("how", how).raw("uptime", at / 1_000_000_000).raw("domid", domain);
        let refused = json::array(refused.iter().map(|line| json::text(line)));
        object.raw("ended", past.text("report", report).raw("refused", refused).end()).end()
    }
}

/// Seconds as hours, minutes and seconds.
fn clock(seconds: u64) -> String {
    format!("{}:{:02}:{:02}", seconds / 3600, seconds / 60 % 60, seconds % 60)
}

impl Guests {
    /// The names of all guests.
    pub(crate) fn names(&self) -> Vec<String> {
        self.list.borrow().iter().map(|entry| entry.config.name.clone()).collect()
    }

    /// Prints all domains.
    pub(crate) fn show_list(&self) {
        match self.listed(false) {
            Ok(answer) => self.terminal.message(&answer.text),
            Err(why) => self.terminal.message(&why),
        }
        mark::point::<LISTED>();
    }

    /// Does what was asked; `say` gets the answer.
    pub(crate) async fn obey(self: &Rc<Self>, line: &Line, say: &dyn Fn(&str)) -> Done {
        match self.carry_out(&line.command).await {
            Ok((answer, wait)) => {
                let text = if line.json { &answer.json } else { &answer.text };
                if !text.is_empty() {
                    say(text);
                }
                wait.map_or(Done::Well, Done::Waits)
            }
            Err(why) if line.json => {
                say(&Object::default().text("error", &why).end());
                Done::Badly
            }
            Err(why) => {
                say(&why);
                Done::Badly
            }
        }
    }

    async fn carry_out(self: &Rc<Self>, command: &Command) -> Result<(Answer, Option<Wait>), String> {
        let mut wait = None;
        let answer = match command {
            Command::List { all } => self.listed(*all)?,
            Command::Info => self.information()?,
            Command::Dmesg { clear } => log(*clear)?,
            Command::Help(verb) => {
                let text = verb.map_or_else(help, |verb| verb.help());
                Answer { json: Object::default().text("help", &text).end(), text }
            }
            Command::Quit => crate::end(self.failed()),
            Command::Uptime(name) => self.uptime(name.as_deref())?,
            Command::Create(name) => self.create(name).await?,
            Command::Console(name) => {
                let name = self.resolve(name)?;
                self.terminal.attach(self, &name)?;
                Answer::done("console", &name)
            }
            Command::Pause(name) => self.with_domain("pause", name, |hypervisor, domain| hypervisor.pause(domain))?,
            Command::Unpause(name) => {
                self.with_domain("unpause", name, |hypervisor, domain| hypervisor.unpause(domain))?
            }
            Command::Destroy(name) => {
                let name = self.resolve(name)?;
                self.destroy(&name)?;
                Answer::done("destroy", &name)
            }
            Command::Domid(name) => {
                let name = self.resolve(name)?;
                let domain = self.with_guest(&name, |guest| guest.domain)?;
                let json = Object::default().text("name", &name).raw("domid", domain).end();
                Answer { text: domain.to_string(), json }
            }
            Command::Shutdown { name, wait: true } | Command::Reboot { name, wait: true } => {
                let (answer, waits) = self.ask(command, name)?;
                wait = Some(waits);
                answer
            }
            Command::Shutdown { name, .. } | Command::Reboot { name, .. } => self.ask(command, name)?.0,
            Command::MemSet { name, mib } => self.set_memory(name, *mib)?,
            Command::Rename { name, to } => self.rename(name, to)?,
        };
        Ok((answer, wait))
    }

    /// The name of a guest that goes by this, its name or the number of its domain.
    fn resolve(&self, given: &str) -> Result<String, String> {
        let list = self.list.borrow();
        let named = |entry: &&Entry| entry.config.name == given;
        let numbered = |entry: &&Entry| entry.guest().is_some_and(|guest| guest.domain.to_string() == given);
        let entry = list.iter().find(named).or_else(|| list.iter().find(numbered));
        let entry = entry.ok_or_else(|| format!("there is no guest {}", given.escape_debug()))?;
        Ok(entry.config.name.clone())
    }

    /// Something of a guest that exists now.
    fn with_guest<T>(&self, name: &str, take: impl FnOnce(&Guest) -> T) -> Result<T, String> {
        let list = self.list.borrow();
        let entry = list.iter().find(|entry| entry.config.name == name);
        entry.and_then(Entry::guest).map(take).ok_or_else(|| format!("guest {name} has ended"))
    }

    fn with_domain<E: ToString>(
        &self,
        verb: &str,
        name: &str,
        act: impl FnOnce(&mut crate::hypervisor::Xen, DomainId) -> Result<(), E>,
    ) -> Result<Answer, String> {
        let name = self.resolve(name)?;
        let domain = self.with_guest(&name, |guest| guest.domain)?;
        act(&mut self.hypervisor.borrow_mut(), domain).map_err(|why| format!("guest {name}: {}", why.to_string()))?;
        Ok(Answer::done(verb, &name))
    }

    /// What the hypervisor knows of a guest's domain.
    fn info_of(&self, domain: DomainId) -> Result<DomainInfo, String> {
        let found = self.hypervisor.borrow_mut().info(domain).map_err(|why| why.to_string())?;
        found.filter(|info| info.domain == domain.0).ok_or_else(|| format!("there is no domain {domain}"))
    }

    async fn create(self: &Rc<Self>, name: &str) -> Result<Answer, String> {
        let name = self.resolve(name)?;
        let ended = |entry: &Entry| entry.config.name == name && matches!(entry.state, State::Ended);
        if !self.list.borrow().iter().any(ended) {
            return Err(format!("guest {name} exists"));
        }
        self.start(&name).await;
        let domain = self.with_guest(&name, |guest| guest.domain).map_err(|_| format!("guest {name} was not made"))?;
        let json = Object::default().text("done", "create").text("name", &name).raw("domid", domain).end();
        Ok(Answer { text: format!("guest {name} is domain {domain}"), json })
    }

    /// Ends a guest at once, or keeps one from being made anew.
    fn destroy(&self, name: &str) -> Result<(), String> {
        match self.take(name) {
            Some((guest, console, _)) => {
                mark::begin::<DESTROY>();
                console.disconnect();
                self.remember(name, Some(guest.domain), "was destroyed", Default::default());
                let left_over = {
                    let hypervisor = &mut *self.hypervisor.borrow_mut();
                    guest.destroy(hypervisor, &mut self.store.clone())
                };
                mark::end::<DESTROY>();
                self.complain(name, &left_over);
                self.changed.set();
            }
            None if self.is_alive(name) => {
                self.remember(name, None, "was given up", Default::default());
                self.set_state(name, State::Ended);
            }
            None => return Err(format!("guest {name} has ended already")),
        }
        Ok(())
    }

    fn ask(&self, command: &Command, name: &str) -> Result<(Answer, Wait), String> {
        let (verb, wish) = match command {
            Command::Reboot { .. } => ("reboot", Wish::Reboot),
            _ => ("shutdown", Wish::Poweroff),
        };
        let name = self.resolve(name)?;
        let guest = self.with_guest(&name, Clone::clone)?;
        guest.ask(wish, &mut self.store.clone()).map_err(|why| format!("guest {name}: {why}"))?;
        let wait = Wait { name: name.clone(), domain: guest.domain, wish };
        Ok((Answer::done(verb, &name), wait))
    }

    fn set_memory(&self, name: &str, mib: u64) -> Result<Answer, String> {
        let name = self.resolve(name)?;
        let guest = self.with_guest(&name, Clone::clone)?;
        let most = guest.config.maxmem;
        if !(1..=most).contains(&mib) {
            return Err(format!("guest {name} may have 1 to {most} MiB"));
        }
        let has = self.info_of(guest.domain)?.tot_pages;
        let free = hypercall::physical_info().map_err(|errno| errno.name().to_string())?.free_pages;
        if (mib << 8).saturating_sub(has) > free {
            return Err(format!("guest {name} has {} MiB, and the machine only {} more", has >> 8, free >> 8));
        }
        // The limit keeps a guest that gave pages back from taking them again unasked.
        let limited = self.hypervisor.borrow_mut().set_max_memory(guest.domain, mib << 10);
        limited.map_err(|why| format!("guest {name}: {why}"))?;
        guest.set_memory_target(mib, &mut self.store.clone()).map_err(|why| format!("guest {name}: {why}"))?;
        Ok(Answer::done("mem-set", &name))
    }

    fn rename(&self, name: &str, to: &str) -> Result<Answer, String> {
        let name = self.resolve(name)?;
        check_name(to).map_err(|why| format!("{}: {why}", to.escape_debug()))?;
        if self.names().iter().any(|other| other == to) {
            return Err(format!("there is a guest {to} already"));
        }
        let mut list = self.list.borrow_mut();
        let Some(entry) = list.iter_mut().find(|entry| entry.config.name == name) else {
            return Err(format!("there is no guest {name}"));
        };
        if matches!(entry.state, State::Waits(_) | State::Planned | State::Begun) {
            return Err(format!("guest {name} is about to be made; try again"));
        }
        if let Some(guest) = entry.guest_mut() {
            guest.rename(to, &mut self.store.clone()).map_err(|why| format!("guest {name}: {why}"))?;
        }
        entry.config.name = to.to_string();
        let console = Rc::clone(&entry.console);
        drop(list);
        console.rename(to);
        self.terminal.renamed(&name, to);
        Ok(Answer::done("rename", to))
    }

    fn uptime(&self, name: Option<&str>) -> Result<Answer, String> {
        let (name, since) = match name {
            None => ("dom0".to_string(), 0),
            Some(name) => {
                let name = self.resolve(name)?;
                self.with_guest(&name, |_| ())?;
                let made = self.list.borrow().iter().find(|entry| entry.config.name == name).map(|entry| entry.made);
                (name, made.unwrap_or(0))
            }
        };
        let seconds = time::now_ns().saturating_sub(since) / 1_000_000_000;
        let text = clock(seconds);
        Ok(Answer { text, json: Object::default().text("name", &name).raw("seconds", seconds).end() })
    }

    fn information(&self) -> Result<Answer, String> {
        let machine = hypercall::physical_info().map_err(|errno| format!("physinfo refused: {}", errno.name()))?;
        let domains = domains(&mut *self.hypervisor.borrow_mut()).map_err(|why| why.to_string())?;
        let vcpus: u32 = domains.iter().map(|domain| domain.nr_online_vcpus).sum();
        let number = hypercall::version();
        let extra = hypercall::extraversion().unwrap_or_default();
        let extra: String = extra.iter().take_while(|byte| **byte != 0).map(|byte| char::from(*byte)).collect();
        let abi = format!("{}.{}{}", number >> 16, number & 0xffff, extra.escape_debug());
        let version = env!("CARGO_PKG_VERSION");
        let (total, free) = (machine.total_pages >> 8, machine.free_pages >> 8);
        let count = domains.len();
        // What belongs to no domain and is not free is the hypervisor's.
        let given: u64 = domains.iter().map(|domain| domain.tot_pages).sum();
        let hypervisor = machine.total_pages.saturating_sub(machine.free_pages + given) << 2;
        let own = domains.iter().find(|domain| domain.domain == self.own.0).map_or(0, |own| own.tot_pages);
        let bundle = (self.bundle.size() as u64).div_ceil(4096);
        let (own, bundle) = (own.saturating_sub(bundle) << 2, bundle << 2);
        // What is set aside for the guests there are: their quotas in the store, and what they print.
        let promised = (memory::reserved().saturating_sub(OWN_BYTES)) >> 10;
        let each = guest_bytes().div_ceil(1024);
        let text = format!(
            "version      Tenon {version} (Xen ABI {abi})\nmemory       {total} MiB, of which {free} MiB are free\n\
             hypervisor   {hypervisor} KiB\ndom0         {own} KiB, {promised} KiB of it for guests ({each} KiB each), and {bundle} KiB of boot bundle\n\
             CPUs         {}\ndomains      {count}, with {vcpus} vcpus online",
            machine.nr_cpus
        );
        let json = Object::default()
            .text("version", version)
            .text("abi", &abi)
            .raw("total_mib", total)
            .raw("free_mib", free)
            .raw("hypervisor_kib", hypervisor)
            .raw("dom0_kib", own)
            .raw("for_guests_kib", promised)
            .raw("each_guest_kib", each)
            .raw("bundle_kib", bundle)
            .raw("cpus", machine.nr_cpus)
            .raw("domains", count)
            .raw("vcpus", vcpus)
            .end();
        Ok(Answer { text, json })
    }

    /// All domains, the guests that are yet to be made, and if `all` are wanted those that have ended.
    fn listed(&self, all: bool) -> Result<Answer, String> {
        let found = domains(&mut *self.hypervisor.borrow_mut()).map_err(|why| why.to_string())?;
        let list = self.list.borrow();
        let name = |domain: u16| {
            let entry = list.iter().find(|entry| entry.guest().is_some_and(|guest| guest.domain.0 == domain));
            let unknown = if domain == 0 { "dom0" } else { "-" };
            entry.map_or(unknown, |entry| &entry.config.name)
        };
        let mut text =
            format!("{:<20} {:>5} {:>8} {:>5} {:<5} {:>9}", "name", "id", "MiB", "vcpus", "state", "seconds");
        for domain in &found {
            text.push_str(&format!("\n{:<20} {}", name(domain.domain), Summary(domain)));
        }
        let to_come = |entry: &&Entry| matches!(entry.state, State::Planned | State::Begun);
        let planned = || list.iter().filter(to_come).map(|entry| &entry.config);
        for GuestConfig { name, memory, vcpus, .. } in planned() {
            text.push_str(&format!("\n{name:<20} {:>5} {memory:>8} {vcpus:>5} {:<5} {:>9}", "-", "-----", "-"));
        }
        let object = |domain: &DomainInfo| {
            let tenths = domain.cpu_time / 100_000_000;
            Object::default()
                .text("name", name(domain.domain))
                .raw("domid", domain.domain)
                .raw("memory_mib", domain.tot_pages >> 8)
                .raw("vcpus", domain.nr_online_vcpus)
                .text("state", &states(domain))
                .raw("seconds", format!("{}.{}", tenths / 10, tenths % 10))
                .end()
        };
        let plan = |guest: &GuestConfig| {
            let (text, raw) = (Object::default().text("name", &guest.name), "null");
            let object = text.raw("domid", raw).raw("memory_mib", guest.memory).raw("vcpus", guest.vcpus);
            object.text("state", "-----").raw("seconds", raw).end()
        };
        let ended = || list.iter().filter(|entry| all && matches!(entry.state, State::Ended | State::Waits(_)));
        ended().for_each(|entry| text.push_str(&format!("\n{}", entry.epitaph())));
        let objects = found.iter().map(object).chain(planned().map(plan)).chain(ended().map(Entry::epitaph_json));
        Ok(Answer { text, json: json::array(objects) })
    }

    /// Whether a guest that was asked to end has done so; an error if it will not do what was wished any more.
    fn has_come(&self, wait: &Wait) -> Option<Result<(), String>> {
        let list = self.list.borrow();
        let state = list.iter().find(|entry| entry.config.name == wait.name).map(|entry| &entry.state);
        match (state, wait.wish) {
            (Some(State::Lives(guest)), _) if guest.domain == wait.domain => None,
            (Some(State::Lives(_)), Wish::Reboot) => Some(Ok(())),
            (Some(State::Waits(_) | State::Begun), Wish::Reboot) => None,
            (_, Wish::Poweroff) => Some(Ok(())),
            _ => Some(Err(format!("guest {} did not come back", wait.name))),
        }
    }
}

/// What the hypervisor has logged, and guests have written there: a line each, escaped.
fn log(clear: bool) -> Result<Answer, String> {
    let refused = |errno: hypercall_abi::Errno| format!("readconsole refused: {}", errno.name());
    let (mut log, mut at, mut piece) = (Vec::new(), 0, [0; 1024]);
    loop {
        let (count, next) = hypercall::read_log(at, false, &mut piece).map_err(refused)?;
        if count == 0 {
            break;
        }
        log.extend_from_slice(piece.get(..count).unwrap_or_default());
        at = next;
    }
    if clear {
        // Only what has been read is forgotten.
        hypercall::read_log(at, true, &mut []).map_err(refused)?;
    }
    let log = String::from_utf8_lossy(&log);
    let lines: Vec<String> = log.lines().map(escaped).collect();
    Ok(Answer { text: lines.join("\n"), json: json::array(lines.iter().map(|line| json::text(line))) })
}

/// A line of text in printable ASCII.
fn escaped(line: &str) -> String {
    let mut shown = String::new();
    for character in line.chars() {
        match character {
            ' '..='~' => shown.push(character),
            _ => shown.extend(character.escape_default()),
        }
    }
    shown
}

/// Carries out the commands of `--exec`, and turns the machine off unless the last one leads to a console.
pub(crate) async fn exec(guests: Rc<Guests>, terminal: Rc<Terminal>, commands: &str) {
    let commands: Vec<&str> = commands.split(';').map(str::trim).filter(|line| !line.is_empty()).collect();
    let parsed: Result<Vec<Option<Line>>, String> = commands.iter().map(|line| Command::parse(line)).collect();
    let lines: Vec<Line> = match parsed {
        Ok(lines) => lines.into_iter().flatten().collect(),
        Err(why) => {
            terminal.message(&format!("error: {why}"));
            crate::end(Some(Failure::Refused))
        }
    };
    let stays = matches!(lines.last(), Some(Line { command: Command::Console(_), .. }));
    let say = |text: &str| if stays { terminal.message(text) } else { terminal.answer(text) };
    for line in &lines {
        let well = match guests.obey(line, &say).await {
            Done::Well => true,
            Done::Badly => false,
            Done::Waits(wait) => loop {
                match guests.has_come(&wait) {
                    None => time::sleep_until(time::now_ns().saturating_add(LOOK_NS)).await,
                    Some(Ok(())) => break true,
                    Some(Err(why)) => {
                        say(&why);
                        break false;
                    }
                }
            },
        };
        if !well {
            crate::end(Some(guests.failed().unwrap_or(Failure::Refused)));
        }
    }
    if stays {
        guests.commanded();
        return;
    }
    crate::end(guests.failed())
}

/// One line of an answer for the program at the other end of the machine's console.
pub(crate) fn marked(line: &str) -> String {
    format!("{ANSWER}{line}\r\n")
}
