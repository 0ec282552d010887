"""The direct path: from the arguments of a public function to a kernel's door, without a line of Python in between.

In a program that has other work the interpreter's code is cold, and a few lines of Python take longer than the loops over a
small array. So a `Direct` stands for a function of Python's: it enters the arguments by that function's own parameters and
asks the door of the operation. Where the door declines, the function is called as if nothing had been; it knows everything.
"""

cdef extern from "Python.h":
    ctypedef object (*vectorcallfunc)(object, PyObject* const*, size_t, PyObject*)
    ctypedef object (*newfunc)(PyTypeObject*, object, PyObject*)
    ctypedef struct PyTypeObject:
        Py_ssize_t tp_vectorcall_offset
        unsigned long tp_flags
        newfunc tp_new
    PyTypeObject PyTuple_Type
    const unsigned long Py_TPFLAGS_HAVE_VECTORCALL, Py_TPFLAGS_METHOD_DESCRIPTOR
    Py_ssize_t PyVectorcall_NARGS(size_t)
    object PyObject_Vectorcall(object, PyObject* const*, size_t, PyObject*)
    PyObject* PyTuple_GET_ITEM(PyObject*, Py_ssize_t)
    Py_ssize_t PyTuple_GET_SIZE(PyObject*)
    int PyContextVar_Get(object, PyObject*, PyObject**) except -1
    int PyObject_GenericSetAttr(object, object, object) except -1


cdef class Direct

ctypedef object (*door_fn)(Direct, const Given*)


cdef class Library:
    """What the direct path needs of the library: kernels know nothing of it.

    Parameters
    ----------
    pin : ContextVar
        What chooses a kernel, beside the dtype.
    calls_of : callable
        Of an array, and whether there is a function of the user's: the `Calls` that take it, or None.
    activations : tuple of (dict, callable, type)
        Those that have a name; what finds the one that a user means; the class of functions of the user's.
    copied : callable
        A copy of an array.
    results : tuple of (type, type, type, callable)
        What forwards save, of a batch and of parts, and what a backward returns; statistics from a count and vectors.
    steps : tuple of float
        The eps of an RMS norm that was given none, by the number of the dtype.
    """

    cdef object pin, calls_of, activation_of, custom, copied, saved, saved_parts, gradients, stats
    cdef dict builtins, known  # of each pin, what takes each dtype: first without functions of the user's, then with them
    cdef tuple steps

    def __cinit__(self, *, pin, calls_of, activations, copied, results, tuple steps not None):
        self.pin, self.calls_of, self.copied, self.steps, self.known = pin, calls_of, copied, steps, {}
        self.builtins, self.activation_of, self.custom = activations
        self.saved, self.saved_parts, self.gradients, self.stats = results
        if len(steps) != <int> Dtype.DTYPES or self.builtins is None or not all(isinstance(kind, type) for kind in results[:3]):
            raise TypeError("steps must be one for each dtype, activations in a dict, and results of classes")
        if not issubclass(self.gradients, tuple):
            raise TypeError("gradients must be a class of tuples")

    def cache_clear(self):
        """Forget which kernels were chosen."""
        self.known = {}

    cpdef pinned(self):
        """What is pinned in this thread or task; an ellipsis where nothing is."""
        cdef PyObject* found = NULL
        if PyContextVar_Get(self.pin, NULL, &found) < 0 or found == NULL:
            return ...
        pin = <object> found
        Py_DECREF(pin)
        return pin

    cdef Calls calls(self, x, activation):
        """What takes plain calls on arrays like x; None where nothing does."""
        cdef int index
        cdef list row
        if not isinstance(x, cnp.ndarray) or not cnp.PyArray_CheckExact(x):
            return None
        index = dtype_or_none(<cnp.ndarray> x)
        if index < 0:
            return None
        if activation is not None and isinstance(activation, self.custom):
            index += Dtype.DTYPES
        pin = self.pinned()
        row = self.known.get(pin)
        if row is None:
            row = self.known[pin] = [...] * (2 * Dtype.DTYPES)
        chosen = row[index]
        if chosen is ...:
            try:
                chosen = row[index] = self.calls_of(x, index >= Dtype.DTYPES)
            except (ValueError, TypeError, RuntimeError):  # of the kernel: the checked way says why, when it has seen the arguments
                return None
        return chosen

    cdef activation(self, x, given):
        """The activation that a user means; None where there is none, or where x is not for the direct path."""
        if given is None or type(x) is not cnp.ndarray:
            return None
        found = self.builtins.get(given) if type(given) is str else None
        return self.activation_of(given) if found is None else found

    cdef bint has_found(self, activation) except -1:
        """Whether something is what `activation` finds: None, or one of the kernels' own."""
        if activation is None:
            return True
        found = self.builtins.get(activation.name)
        return found is activation or (
            found is not None and type(activation) is type(found) and activation.code == found.code
            and type(activation.parameter) is float and isfinite(<double> activation.parameter)
        )


@cython.final
cdef class Direct:
    """A public function whose plain calls take the direct path. Python may see it as that function.

    Parameters
    ----------
    function : function
        One that has a door. Its parameters are those that can be given, and all that is unusual is left to it.
    library : Library
    """

    cdef vectorcallfunc vectorcall
    cdef Library library
    cdef door_fn door
    cdef str kind
    cdef bint keeps
    cdef object function
    cdef tuple names  # of the parameters, in their order
    cdef tuple defaults  # `usual` points to these
    cdef int positional  # how many parameters may be given by their place
    cdef int[GIVEN] places  # of each parameter in a Given
    cdef Given usual
    cdef dict __dict__
    cdef object __weakref__

    def __cinit__(self, function not None, Library library not None):
        cdef const Door* door = door_of(function.__qualname__.encode())
        cdef PyObject** usual = <PyObject**> &self.usual
        cdef int i
        # Cython knows of tp_call alone, for which the interpreter makes a tuple and a dict of the arguments.
        (<PyTypeObject*> Direct).tp_vectorcall_offset = <char*> &self.vectorcall - <char*> <PyObject*> self
        (<PyTypeObject*> Direct).tp_flags |= Py_TPFLAGS_HAVE_VECTORCALL | Py_TPFLAGS_METHOD_DESCRIPTOR
        code = function.__code__
        self.door, self.kind, self.keeps = door.run, door.kind.decode(), door.keeps
        self.vectorcall, self.library, self.function = call_direct, library, function
        self.positional = code.co_argcount
        self.names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        values = function.__defaults__ or ()
        defaults = dict(zip(self.names[self.positional - len(values) : self.positional], values)) | (function.__kwdefaults__ or {})
        self.defaults = tuple(defaults.values())
        for i in range(GIVEN):
            usual[i] = <PyObject*> None
        for i, name in enumerate(self.names):
            if name not in PARAMETERS:
                raise ValueError(f"no parameter of a door is called {name!r}")
            self.places[i] = PARAMETERS.index(name)
            usual[self.places[i]] = <PyObject*> defaults[name] if name in defaults else NULL

    cdef bint enter(self, Given* g, PyObject* const* arguments, Py_ssize_t number, PyObject* keywords) noexcept:
        """Enter the arguments; whether they are those of the function."""
        cdef PyObject** given = <PyObject**> g
        cdef PyObject* name
        cdef Py_ssize_t i, k, parameters = len(self.names)
        if number > self.positional:
            return False
        memcpy(g, &self.usual, sizeof(Given))
        for i in range(number):
            given[self.places[i]] = arguments[i]
        for k in range(0 if keywords == NULL else PyTuple_GET_SIZE(keywords)):
            name = PyTuple_GET_ITEM(keywords, k)
            for i in range(number, parameters):
                if PyTuple_GET_ITEM(<PyObject*> self.names, i) == name:  # a name in a program's text is one object
                    break
            else:
                return False
            given[self.places[i]] = arguments[number + k]
        for i in range(number, self.positional):
            if given[self.places[i]] == NULL:
                return False
        return True

    def __call__(self, *args, **kwargs):
        return self.function(*args, **kwargs)

    def __get__(self, instance, owner):
        return self if instance is None else MethodType(self, instance)

    def __getattr__(self, name):
        return getattr(self.function, name)  # its code and defaults, for which tools ask that look into functions

    def __repr__(self):
        return f"<function {self.function.__qualname__}>"

    def __reduce__(self):
        return self.function.__qualname__  # found by its name, as a function is


cdef object call_direct(object function, PyObject* const* arguments, size_t flags, PyObject* keywords):
    """Call a Direct."""
    cdef Given g
    cdef Direct self = <Direct> function
    if self.enter(&g, arguments, PyVectorcall_NARGS(flags), keywords):
        found = self.door(self, &g)
        if found is not None:
            return found
    return PyObject_Vectorcall(self.function, arguments, flags, keywords)


cdef object new(type kind):
    """An object of a class of Python's, of which no initializer has run: these take as long as a small call."""
    if (<PyTypeObject*> kind).tp_new == NULL:
        raise TypeError(f"{kind} makes no objects")
    return (<PyTypeObject*> kind).tp_new(<PyTypeObject*> kind, (), NULL)


cdef inline bint is_given(PyObject* argument) noexcept:
    return argument != <PyObject*> None


cdef object forward(Direct self, const Given* g):
    """Batch normalization, and what its backward needs where the function keeps that."""
    cdef Library library = self.library
    cdef Calls calls
    if is_given(g.mask) or is_given(g.stats):
        return None
    activation = library.activation(<object> g.x, <object> g.activation)
    calls = library.calls(<object> g.x, activation)
    if calls is None:
        return None
    if not self.keeps:
        return plain_forward(calls, g, activation, False)
    found = plain_forward(calls, g, activation, kept_residual(library, g, activation))
    if found is None:
        return None
    saved = new(library.saved)
    PyObject_GenericSetAttr(saved, "made", found[1])
    return found[0], saved


cdef object kept_residual(Library library, const Given* g, activation):
    """A copy of a residual that is like the array of the call, where the backward needs it."""
    residual = <object> g.residual
    return library.copied(residual) if activation is not None and is_twin(residual, <cnp.ndarray> g.x) else None


cdef object backward(Direct self, const Given* g):
    cdef Library library = self.library
    cdef Calls calls
    saved = <object> g.saved
    if not isinstance(saved, library.saved) or <object> g.from_output is not False:
        return None
    made = saved.made
    if type(made) is not tuple or len(<tuple> made) != MADE:
        return None
    calls = library.calls(<object> g.x, (<tuple> made)[MADE_ACTIVATION])
    return None if calls is None else gradients(library, plain_backward(calls, g, made))


cdef object gradients(Library library, found):
    return None if found is None else PyTuple_Type.tp_new(<PyTypeObject*> library.gradients, (found,), NULL)


cdef object stats(Direct self, const Given* g):
    cdef Calls calls
    if is_given(g.mask):
        return None
    calls = self.library.calls(<object> g.x, None)
    found = None if calls is None else plain_stats(calls, g)
    return None if found is None else self.library.stats(*found)


cdef object elemt(Direct self, const Given* g):
    cdef Calls calls
    activation = self.library.activation(<object> g.x, <object> g.activation)
    calls = self.library.calls(<object> g.x, activation)
    return None if calls is None else plain_inference(calls, g, <object> g.mean, <object> g.invstd, activation, False)


cdef object frozen(Direct self, const Given* g):
    ready = (<object> g.self)._folded.ready
    if ready is None:
        return None
    prepared, pin = ready
    return (<Prepared?> prepared).normalize(g) if pin is self.library.pinned() else None


cdef object parts_forward(Direct self, const Given* g):
    """Normalization of parts, and what its backward needs where the function keeps that."""
    cdef Library library = self.library
    cdef Calls calls
    x, eps, weight, bias = <object> g.x, <object> g.eps, <object> g.weight, <object> g.bias
    if is_given(g.running_mean) or is_given(g.running_var):
        return None
    if self.kind == "instance_norm" and (<object> g.use_input_stats is not True or type(<object> g.momentum) is not float):
        return None
    calls = library.calls(x, None)
    if calls is None:
        return None
    if eps is None and self.kind == "rms_norm":
        eps = library.steps[dtype_or_none(x)]
    activation = library.activation(x, <object> g.activation)
    kept = kept_residual(library, g, activation) if self.keeps else None
    found = plain_parts_forward(calls, g, self.kind, activation, eps)
    if found is None or not self.keeps:
        return None if found is None else found[0]
    y, made, axis, group = found
    saved = new(library.saved_parts)
    (<dict> saved.__dict__).update(
        kind=self.kind, shape=x.shape, dtype=x.dtype, axis=axis, group=group, mean=made[0], mean_lo=made[1], invstd=made[2],
        weight=None if weight is None else cnp.PyArray_Flatten(weight, cnp.NPY_CORDER),
        bias=None if bias is None else cnp.PyArray_Flatten(bias, cnp.NPY_CORDER),
        activation=activation, residual=kept, has_residual=<object> g.residual is not None,
    )
    return y, saved


cdef object parts_backward(Direct self, const Given* g):
    cdef Library library = self.library
    cdef Calls calls
    cdef dict saved
    if type(<object> g.saved) is not library.saved_parts:
        return None
    calls = library.calls(<object> g.x, None)
    if calls is None:
        return None
    saved = (<object> g.saved).__dict__
    try:
        return gradients(library, plain_parts_backward(calls, g, self.kind, saved)) if is_whole(library, saved, self.kind) else None
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError):
        return None  # what was saved has been changed, and the checked way says how


cdef bint is_whole(Library library, dict saved, str kind) except -1:
    """Whether what was saved is that of a forward of this kind, as far as its shapes and arrays do not tell."""
    whose, axis = saved["kind"], saved["axis"]
    return (
        type(whose) is str and whose == kind and type(axis) is int and axis >= 0 and type(saved["has_residual"]) is bool
        and library.has_found(saved["activation"])
    )


cdef struct Door:
    const char* name  # of the function that it serves
    door_fn run
    const char* kind
    bint keeps  # what a backward needs

cdef Door[18] DOORS = [
    Door(b"batch_norm", forward, b"batch_norm", False),
    Door(b"batch_norm_forward", forward, b"batch_norm", True),
    Door(b"batch_norm_backward", backward, b"batch_norm", False),
    Door(b"batch_norm_stats", stats, b"batch_norm", False),
    Door(b"batch_norm_elemt", elemt, b"batch_norm", False),
    Door(b"FrozenBatchNorm.__call__", frozen, b"batch_norm", False),
    Door(b"instance_norm", parts_forward, b"instance_norm", False),
    Door(b"instance_norm_forward", parts_forward, b"instance_norm", True),
    Door(b"instance_norm_backward", parts_backward, b"instance_norm", False),
    Door(b"group_norm", parts_forward, b"group_norm", False),
    Door(b"group_norm_forward", parts_forward, b"group_norm", True),
    Door(b"group_norm_backward", parts_backward, b"group_norm", False),
    Door(b"layer_norm", parts_forward, b"layer_norm", False),
    Door(b"layer_norm_forward", parts_forward, b"layer_norm", True),
    Door(b"layer_norm_backward", parts_backward, b"layer_norm", False),
    Door(b"rms_norm", parts_forward, b"rms_norm", False),
    Door(b"rms_norm_forward", parts_forward, b"rms_norm", True),
    Door(b"rms_norm_backward", parts_backward, b"rms_norm", False),
]


cdef const Door* door_of(bytes name) except NULL:
    """The door that serves a function."""
    cdef size_t i
    for i in range(sizeof(DOORS) // sizeof(Door)):
        if DOORS[i].name == name:
            return &DOORS[i]
    raise ValueError(f"there is no door for {name.decode()}")
